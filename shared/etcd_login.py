"""The token of a user of etcd: got with the password, renewed before it expires, and again whenever
etcd does not know it any more. A process with a certificate, or without a user, needs none.

etcd forgets a simple token 5 minutes after its last use (`--auth-token-ttl`), at its restart, and
when the password changes; a JWT ends after its own time and with any change of users and roles. A
token that ends sooner than it is renewed teaches this class to renew earlier. That may have been a
restart, so with each renewal in time it waits a little longer again.
"""

from __future__ import annotations

import threading
from typing import Any

import grpc

from shared.clock import Clock

RENEW_AFTER_S = 150.0
RENEW_AFTER_MIN_S = 10.0
_PATIENCE_GROWS = 1.1
_RETRY_S = 1.0
_NOT_ENABLED = "authentication is not enabled"
_LAPSED = (
    "invalid auth token",
    "revision in header is old",
    "revision of auth store is old",
    "user name is empty",  # authentication was turned on after we had asked
)
Metadata = tuple[tuple[str, str], ...]


def has_lapsed(error: grpc.RpcError) -> bool:
    """Whether etcd refused a call before it did anything, because of who the caller was a moment
    ago: its token is gone, or users and roles were changed meanwhile. The same call may be sent
    again, with a new token."""
    return is_lapse(error.details() or "")


def is_lapse(details: str) -> bool:
    return any(text in details for text in _LAPSED)


class EtcdLogin:
    """Its methods may be called from any thread; those that renew block."""

    def __init__(self, request: Any, authenticate: Any, timeout_s: float, clock: Clock) -> None:
        """`request` is an AuthenticateRequest, `authenticate` the call that takes it. None for both
        without a user: then there is never a token."""
        self._request = request
        self._authenticate = authenticate
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._token: str | None = None  # "": etcd has its authentication turned off
        self._got_at = 0.0
        self._renew_after_s = RENEW_AFTER_S
        self._closed = threading.Event()
        self._has_thread = False

    @property
    def needs_renewal(self) -> bool:
        """Before the first call."""
        return self._request is not None and self._token is None

    @property
    def token(self) -> str | None:
        return self._token

    @property
    def renew_after_s(self) -> float:
        """The age at which a token is renewed, if etcd does not forget it before."""
        return self._renew_after_s

    @property
    def metadata(self) -> Metadata:
        """What a call says of its caller."""
        return (("token", self._token),) if self._token else ()

    def renew(self, lapsed: str | None) -> None:
        """Gets a new token, unless another thread has replaced `lapsed` meanwhile. Raises
        grpc.RpcError."""
        if self._request is None:
            return
        with self._lock:
            if self._token != lapsed:
                return
            if lapsed:
                lived_s = self._clock.now() - self._got_at
                sooner_s = max(lived_s / 2, RENEW_AFTER_MIN_S)
                self._renew_after_s = min(self._renew_after_s, sooner_s)
            self._fetch()
            if not self._has_thread:
                self._has_thread = True
                threading.Thread(target=self._renew_in_time, name="etcd-login", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _fetch(self) -> None:
        try:
            reply = self._authenticate(self._request, self._timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if _NOT_ENABLED not in (error.details() or ""):
                raise
            self._token = ""
        else:
            self._token = str(reply.token)
        self._got_at = self._clock.now()

    def _renew_in_time(self) -> None:
        wait_s = self._renew_after_s
        while not self._closed.wait(wait_s):
            try:
                with self._lock:
                    self._fetch()
                    self._renew_after_s = min(self._renew_after_s * _PATIENCE_GROWS, RENEW_AFTER_S)
                wait_s = self._renew_after_s
            except (grpc.RpcError, ValueError):  # the calls that need it say so
                wait_s = _RETRY_S
