"""Single calls to etcd through etcd3, and the translation of gRPC's errors into ours. The only
module that imports etcd3. Watches are in `shared.etcd_watch`."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

# etcd3's generated code loads under current protobuf only with this implementation, and the choice
# is made when protobuf is first imported.
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc

with warnings.catch_warnings():  # protobuf warns of the age of etcd3's generated code
    warnings.simplefilter("ignore", DeprecationWarning)
    import etcd3
    import etcd3.etcdrpc

from shared.clock import SystemClock
from shared.errors import ConfigError, LeaseLost, StoreError, StoreUnavailable, TxnConflict
from shared.etcd_health import EtcdHealth
from shared.etcd_login import EtcdLogin, Metadata, has_lapsed
from shared.etcd_options import EtcdOptions
from shared.store import Compare, Delete, KeyValue, Put, Snapshot

T = TypeVar("T")
rpc: Any = etcd3.etcdrpc

_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a second store must not share a broken connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", -1),
    # etcd closes connections that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 5500),
    ("grpc.keepalive_timeout_ms", 2000),
    # Of gRPC's own pings, of which one may be under way when a keepalive is due, and stands for it:
    # with the default of 60 s a member that hangs would be left as late.
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
)
_UNKNOWN_OUTCOME = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_KEEP_ALIVE_THREADS = 4
_LAPSES_MAX = 5
"""A call is sent again so often if users and roles change while it is under way."""
_WHO_IS_NOBODY = "user name is empty"
_NO_SPACE = "database space exceeded"
_ALARMS = {1: "NOSPACE", 2: "CORRUPT"}


def translate(error: grpc.RpcError, endpoints: str) -> StoreError:
    code, details = error.code(), error.details() or ""
    if _NO_SPACE in details:
        return StoreUnavailable(
            f"etcd at {endpoints} takes no writes, because its space is used up (alarm NOSPACE): "
            "compact and defragment it, then disarm the alarm"
        )
    if code in _UNKNOWN_OUTCOME and not has_lapsed(error):
        return StoreUnavailable(f"etcd at {endpoints} did not answer ({code.name}: {details})")
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseLost(details)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return StoreError(
            f"etcd at {endpoints} does not let this process do that: users and roles are made by "
            "`starfish etcd-setup`"
        )
    if _WHO_IS_NOBODY in details:
        return StoreError(
            f"etcd at {endpoints} asks who we are: pass --etcd-cert and --etcd-key, or --etcd-user "
            "and its password"
        )
    return StoreError(f"etcd at {endpoints} refused the request ({code.name}: {details})")


def prefix_end(prefix: str) -> bytes:
    """The first key after all keys that begin with `prefix`."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])


def to_key_value(kv: Any) -> KeyValue:
    return KeyValue(
        key=kv.key.decode(),
        value=kv.value,
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        lease_id=kv.lease,
    )


class EtcdClient:
    """One gRPC channel to one etcd cluster. Unary calls start on the event loop and complete on
    gRPC's own thread, so that publishing a map never waits for a thread pool."""

    def __init__(self, options: EtcdOptions, timeout_s: float) -> None:
        """Raises ConfigError."""
        options.check()
        self.endpoints = options.etcd
        self.timeout_s = timeout_s
        host, port = _target(options)
        self._etcd = etcd3.Etcd3Client(
            host=host,
            port=port,
            ca_cert=options.etcd_ca,
            cert_cert=options.etcd_cert,
            cert_key=options.etcd_key,
            timeout=timeout_s,
            grpc_options=(*_CHANNEL_OPTIONS, *_server_name_option(options)),
        )
        self.channel: Any = self._etcd.channel
        self.watch_stub: Any = rpc.WatchStub(self.channel)
        self._kv: Any = self._etcd.kvstub
        self._lease: Any = self._etcd.leasestub
        self._maintenance: Any = rpc.MaintenanceStub(self.channel)
        self.login = _login_of(options, self.channel, timeout_s)
        self._threads = ThreadPoolExecutor(_KEEP_ALIVE_THREADS, thread_name_prefix="etcd-lease")

    def close(self) -> None:
        self.login.close()
        self._etcd.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def check(self) -> None:
        """Returns if etcd answers and knows us, whatever it lets us do. Raises StoreError."""
        try:
            await self.call(self._kv.Range, rpc.RangeRequest(key=b"/starfish/"))
        except StoreError as error:
            cause = error.__cause__
            if not (
                isinstance(cause, grpc.RpcError)
                and cause.code() is grpc.StatusCode.PERMISSION_DENIED
            ):
                raise

    async def get(self, key: str) -> KeyValue | None:
        reply = await self.call(self._kv.Range, rpc.RangeRequest(key=key.encode()))
        return to_key_value(reply.kvs[0]) if reply.kvs else None

    async def get_prefix(self, prefix: str) -> Snapshot:
        return snapshot_of(await self.call(self._kv.Range, range_request(prefix)))

    def get_prefix_blocking(self, prefix: str) -> Snapshot:
        """For the thread of a watch. Raises grpc.RpcError."""
        request = range_request(prefix)
        return snapshot_of(
            self._send(lambda: self._kv.Range(request, self.timeout_s, metadata=self._metadata))
        )

    async def put(self, key: str, value: bytes, lease_id: int) -> int:
        request = rpc.PutRequest(key=key.encode(), value=value, lease=lease_id)
        return int((await self.call(self._kv.Put, request)).header.revision)

    async def delete(self, key: str) -> bool:
        reply = await self.call(self._kv.DeleteRange, rpc.DeleteRangeRequest(key=key.encode()))
        return bool(reply.deleted)

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put | Delete]) -> int:
        request = rpc.TxnRequest(
            compare=[_compare(c) for c in compare], success=[_operation(op) for op in then]
        )
        reply = await self.call(self._kv.Txn, request)
        if not reply.succeeded:
            raise TxnConflict(f"one of {', '.join(c.key for c in compare)} has changed")
        return int(reply.header.revision)

    async def health(self) -> EtcdHealth:
        """Of one member, whichever answers, and all members' alarms. Raises StoreError."""
        alarms = await self.call(self._maintenance.Alarm, rpc.AlarmRequest())
        status = await self.call(self._maintenance.Status, rpc.StatusRequest())
        kinds = {_ALARMS.get(each.alarm, str(each.alarm)) for each in alarms.alarms}
        return EtcdHealth(
            alarms=tuple(sorted(kinds)), version=status.version, size_bytes=status.dbSize
        )

    async def grant_lease(self, ttl_s: float) -> int:
        request = rpc.LeaseGrantRequest(TTL=max(1, math.ceil(ttl_s)))
        return int((await self.call(self._lease.LeaseGrant, request)).ID)

    async def revoke_lease(self, lease_id: int) -> None:
        try:
            await self.call(self._lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id))
        except LeaseLost:
            return

    async def keep_alive(self, lease_id: int) -> float:
        loop = asyncio.get_running_loop()
        try:
            ttl_s = await loop.run_in_executor(
                self._threads, self._send, lambda: self._keep_alive_once(lease_id)
            )
        except grpc.RpcError as error:
            raise translate(error, self.endpoints) from error
        if ttl_s <= 0:
            raise LeaseLost(f"lease {lease_id:x} has expired or was revoked")
        return ttl_s

    def _keep_alive_once(self, lease_id: int) -> float:
        """etcd has no unary call for this, so it is a stream of one request and one reply."""
        requests = iter([rpc.LeaseKeepAliveRequest(ID=lease_id)])
        for reply in self._lease.LeaseKeepAlive(
            requests, self.timeout_s, metadata=self._metadata, wait_for_ready=True
        ):
            return float(reply.TTL)
        return 0.0

    @property
    def _metadata(self) -> Metadata:
        return self.login.metadata

    def _send(self, call: Callable[[], T]) -> T:
        """On a thread: `call`, again with a new token if etcd has forgotten the old one."""
        for lapses in itertools.count(1):
            token = self.login.token
            try:
                if self.login.needs_renewal:
                    self.login.renew(None)
                return call()
            except grpc.RpcError as error:
                if not has_lapsed(error) or lapses > _LAPSES_MAX:
                    raise
                self.login.renew(token)
        raise AssertionError("unreachable")

    async def call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        """A unary call. Raises StoreError."""
        for lapses in itertools.count(1):
            token = self.login.token
            try:
                if self.login.needs_renewal:
                    await self._renew(None)
                return await self._call_once(method, request, timeout_s or self.timeout_s)
            except grpc.RpcError as error:
                if not has_lapsed(error) or lapses > _LAPSES_MAX:
                    raise translate(error, self.endpoints) from error
                await self._renew(token)

    async def _renew(self, lapsed: str | None) -> None:
        """Raises StoreError."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self.login.renew, lapsed)
        except grpc.RpcError as error:
            raise translate(error, self.endpoints) from error

    async def _call_once(self, method: Any, request: Any, timeout_s: float) -> Any:
        """Raises grpc.RpcError, StoreUnavailable."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        try:
            call = method.future(
                request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=True
            )
        except ValueError as error:  # grpc raises this if the channel is closed
            raise StoreUnavailable("the connection to etcd is closed") from error
        call.add_done_callback(lambda _: _wake(loop, done))
        try:
            await done
            return call.result()
        except grpc.FutureCancelledError as error:
            raise StoreUnavailable("the connection to etcd was closed in mid-call") from error
        finally:
            call.cancel()


def _login_of(options: EtcdOptions, channel: Any, timeout_s: float) -> EtcdLogin:
    """Raises ConfigError."""
    password = options.password(os.environ)
    if password is None:
        return EtcdLogin(None, None, timeout_s, SystemClock())
    request = rpc.AuthenticateRequest(name=options.etcd_user, password=password)
    return EtcdLogin(request, rpc.AuthStub(channel).Authenticate, timeout_s, SystemClock())


def range_request(prefix: str) -> Any:
    return rpc.RangeRequest(key=prefix.encode(), range_end=prefix_end(prefix))


def watch_request(prefix: str, start_revision: int) -> Any:
    create = rpc.WatchCreateRequest(
        key=prefix.encode(), range_end=prefix_end(prefix), start_revision=start_revision
    )
    return rpc.WatchRequest(create_request=create)


def snapshot_of(reply: Any) -> Snapshot:
    return Snapshot(
        revision=reply.header.revision, values=tuple(to_key_value(kv) for kv in reply.kvs)
    )


def _wake(loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]) -> None:
    def settle() -> None:
        if not done.done():
            done.set_result(None)

    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed, and with it whoever waited
        return


def _compare(compare: Compare) -> Any:
    return rpc.Compare(
        key=compare.key.encode(),
        target=rpc.Compare.MOD,
        result=rpc.Compare.EQUAL,
        mod_revision=compare.mod_revision,
    )


def _operation(operation: Put | Delete) -> Any:
    key = operation.key.encode()
    if isinstance(operation, Delete):
        return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
    put = rpc.PutRequest(key=key, value=operation.value, lease=operation.lease_id)
    return rpc.RequestOp(request_put=put)


def _target(options: EtcdOptions) -> tuple[str, str]:
    """etcd3 takes one host and one port, and joins them with a colon. Several endpoints go through
    gRPC's ipv4 resolver; the port of the last one is passed as the port. Raises ConfigError."""
    pairs = [_split(endpoint, options) for endpoint in options.endpoints]
    if not pairs:
        raise ConfigError("no etcd endpoint is given; pass --etcd HOST:PORT")
    if len(pairs) == 1:
        return pairs[0]
    addresses = [f"{_ipv4(host)}:{port}" for host, port in pairs[:-1]]
    return "ipv4:" + ",".join([*addresses, _ipv4(pairs[-1][0])]), pairs[-1][1]


def _server_name_option(options: EtcdOptions) -> tuple[tuple[str, str], ...]:
    """gRPC checks the certificates of all endpoints of a channel against one name."""
    if options.etcd_ca is None:
        return ()
    name = options.etcd_server_name or _split(options.endpoints[0], options)[0]
    return (("grpc.ssl_target_name_override", name.strip("[]")),)


def _split(endpoint: str, options: EtcdOptions) -> tuple[str, str]:
    if endpoint.startswith("https://") and options.etcd_ca is None:
        raise ConfigError(f"etcd endpoint {endpoint!r} is one with TLS: pass --etcd-ca as well")
    if endpoint.startswith("http://") and options.etcd_ca is not None:
        raise ConfigError(f"etcd endpoint {endpoint!r} is one without TLS: leave --etcd-ca out")
    plain = endpoint.removeprefix("http://").removeprefix("https://")
    host, _, port = plain.rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"etcd endpoint {endpoint!r} is not HOST:PORT")
    return host, port


def _ipv4(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise StoreUnavailable(f"cannot resolve etcd host {host!r}: {error.strerror}") from error
