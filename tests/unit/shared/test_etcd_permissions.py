"""The table behind etcd's users: what each service may never write."""

from __future__ import annotations

from shared.etcd_permissions import EtcdService, accounts, user_of, writable_keys
from shared.keys import Keys
from shared.types import Accuser, Incarnation, RankId

KEYS = Keys("blue")
IDS = RankId(3), Incarnation(1)
DECISIONS = (KEYS.map, KEYS.spec, KEYS.term, KEYS.verdict(*IDS), KEYS.assignment(*IDS))


def may_write(service: EtcdService, key: str) -> bool:
    return any(
        key.startswith(own) if own.endswith("/") else key == own
        for own in writable_keys(KEYS)[service]
    )


def test_the_control_plane_alone_decides() -> None:
    for service in EtcdService:
        for key in DECISIONS:
            assert may_write(service, key) == (service is EtcdService.CONTROL_PLANE)


def test_nobody_speaks_as_another_kind_of_accuser() -> None:
    own = {
        EtcdService.GATEWAY: {Accuser.GATEWAY},
        EtcdService.RANK: {Accuser.RANK},
        EtcdService.AGENT: {Accuser.AGENT, Accuser.RANK},  # it ends its ranks' leases
        EtcdService.CONTROL_PLANE: set(Accuser),
    }
    for service in EtcdService:
        found = {a for a in Accuser if may_write(service, KEYS.suspicion(*IDS, a, "x"))}
        assert found == own.get(service, set())


def test_every_account_reads_its_instance_and_has_nothing_of_another() -> None:
    other = Keys("bluer").root
    for account in accounts(KEYS):
        keys = {allowed.key for allowed in account.permissions}
        assert KEYS.root in keys
        assert all(key.startswith(KEYS.root) and not other.startswith(key) for key in keys)
    names = [account.name for account in accounts(KEYS)]
    assert len(set(names)) == len(EtcdService)
    assert user_of(KEYS, EtcdService.RANK) in names
