"""The token of a user of etcd: when a new one is got, and what is learnt from one that ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc
import pytest

from shared.etcd_login import RENEW_AFTER_MIN_S, RENEW_AFTER_S, EtcdLogin, has_lapsed
from tests.support.fake_clock import FakeClock


class Refusal(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, details: str) -> None:
        super().__init__(details)
        self._details = details

    def details(self) -> str:
        return self._details


@dataclass
class Reply:
    token: str


@dataclass
class Etcd:
    """Gives a new token each time, or refuses."""

    refusal: str = ""
    given: list[str] = field(default_factory=list)

    def authenticate(self, request: object, timeout_s: float, *, wait_for_ready: bool) -> Reply:
        if self.refusal:
            raise Refusal(self.refusal)
        self.given.append(f"token {len(self.given)}")
        return Reply(self.given[-1])


@pytest.fixture
def etcd() -> Etcd:
    return Etcd()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def login(etcd: Etcd, clock: FakeClock) -> EtcdLogin:
    return EtcdLogin("user and password", etcd.authenticate, 1.0, clock)


def test_without_a_user_there_is_never_a_token(clock: FakeClock) -> None:
    login = EtcdLogin(None, None, 1.0, clock)
    assert not login.needs_renewal
    login.renew(None)
    assert login.metadata == ()


def test_a_token_that_lapsed_is_replaced_once_for_all_who_had_it(
    login: EtcdLogin, etcd: Etcd
) -> None:
    assert login.needs_renewal
    login.renew(None)
    assert login.metadata == (("token", "token 0"),)
    for _ in range(3):
        login.renew("token 0")
    assert etcd.given == ["token 0", "token 1"]
    assert login.metadata == (("token", "token 1"),)
    login.close()


def test_a_token_that_ended_early_teaches_to_renew_earlier_within_bounds(
    login: EtcdLogin, clock: FakeClock
) -> None:
    login.renew(None)
    assert login.renew_after_s == RENEW_AFTER_S
    clock.advance(60.0)
    login.renew("token 0")
    assert login.renew_after_s == 30.0
    clock.advance(0.1)  # etcd was restarted
    login.renew("token 1")
    assert login.renew_after_s == RENEW_AFTER_MIN_S
    clock.advance(1000.0)
    login.renew("token 2")
    assert login.renew_after_s == RENEW_AFTER_MIN_S
    login.close()


def test_an_etcd_that_asks_nobody_needs_no_token(login: EtcdLogin, etcd: Etcd) -> None:
    etcd.refusal = "etcdserver: authentication is not enabled"
    login.renew(None)
    assert not login.needs_renewal
    assert login.metadata == ()
    etcd.refusal = ""  # now it asks
    login.renew("")
    assert login.metadata == (("token", "token 0"),)
    login.close()


def test_a_wrong_password_is_an_error(login: EtcdLogin, etcd: Etcd) -> None:
    etcd.refusal = "authentication failed, invalid user ID or password"
    with pytest.raises(grpc.RpcError):
        login.renew(None)


@pytest.mark.parametrize(
    ("details", "lapsed"),
    [
        ("etcdserver: invalid auth token", True),
        ("auth: revision in header is old", True),
        ("etcdserver: revision of auth store is old", True),
        ("etcdserver: user name is empty", True),
        ("etcdserver: permission denied", False),
        ("etcdserver: mvcc: required revision has been compacted", False),
    ],
)
def test_what_may_be_sent_again_with_a_new_token(details: str, lapsed: bool) -> None:
    assert has_lapsed(Refusal(details)) == lapsed
