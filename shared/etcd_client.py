"""Single calls to etcd through etcd3, and the translation of gRPC's errors into ours. The only
module that imports etcd3. Watches are in `shared.etcd_watch`."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# etcd3's generated code loads under current protobuf only with this implementation, and the choice
# is made when protobuf is first imported.
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc

with warnings.catch_warnings():  # protobuf warns of the age of etcd3's generated code
    warnings.simplefilter("ignore", DeprecationWarning)
    import etcd3
    import etcd3.etcdrpc as rpc

from shared.errors import ConfigError, LeaseLost, StoreError, StoreUnavailable, TxnConflict
from shared.store import Compare, Delete, KeyValue, Put, Snapshot

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


def translate(error: grpc.RpcError, endpoints: str) -> StoreError:
    code, details = error.code(), error.details() or ""
    if code in _UNKNOWN_OUTCOME:
        return StoreUnavailable(f"etcd at {endpoints} did not answer ({code.name}: {details})")
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseLost(details)
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

    def __init__(self, endpoints: Sequence[str], timeout_s: float) -> None:
        self.endpoints = ",".join(endpoints)
        self.timeout_s = timeout_s
        host, port = _target(endpoints)
        self._etcd = etcd3.Etcd3Client(
            host=host, port=port, timeout=timeout_s, grpc_options=_CHANNEL_OPTIONS
        )
        self.watch_stub: Any = rpc.WatchStub(self._etcd.channel)
        self._kv: Any = self._etcd.kvstub
        self._lease: Any = self._etcd.leasestub
        self._keep_alives = ThreadPoolExecutor(_KEEP_ALIVE_THREADS, thread_name_prefix="etcd-lease")

    def close(self) -> None:
        self._etcd.close()
        self._keep_alives.shutdown(wait=False, cancel_futures=True)

    async def get(self, key: str) -> KeyValue | None:
        reply = await self._call(self._kv.Range, rpc.RangeRequest(key=key.encode()))
        return to_key_value(reply.kvs[0]) if reply.kvs else None

    async def get_prefix(self, prefix: str) -> Snapshot:
        return snapshot_of(await self._call(self._kv.Range, range_request(prefix)))

    def get_prefix_blocking(self, prefix: str) -> Snapshot:
        """For the thread of a watch. Raises grpc.RpcError."""
        return snapshot_of(self._kv.Range(range_request(prefix), self.timeout_s))

    async def put(self, key: str, value: bytes, lease_id: int) -> int:
        request = rpc.PutRequest(key=key.encode(), value=value, lease=lease_id)
        return int((await self._call(self._kv.Put, request)).header.revision)

    async def delete(self, key: str) -> bool:
        reply = await self._call(self._kv.DeleteRange, rpc.DeleteRangeRequest(key=key.encode()))
        return bool(reply.deleted)

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put | Delete]) -> int:
        request = rpc.TxnRequest(
            compare=[_compare(c) for c in compare], success=[_operation(op) for op in then]
        )
        reply = await self._call(self._kv.Txn, request)
        if not reply.succeeded:
            raise TxnConflict(f"one of {', '.join(c.key for c in compare)} has changed")
        return int(reply.header.revision)

    async def grant_lease(self, ttl_s: float) -> int:
        request = rpc.LeaseGrantRequest(TTL=max(1, math.ceil(ttl_s)))
        return int((await self._call(self._lease.LeaseGrant, request)).ID)

    async def revoke_lease(self, lease_id: int) -> None:
        try:
            await self._call(self._lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id))
        except LeaseLost:
            return

    async def keep_alive(self, lease_id: int) -> float:
        loop = asyncio.get_running_loop()
        try:
            ttl_s = await loop.run_in_executor(self._keep_alives, self._keep_alive_once, lease_id)
        except grpc.RpcError as error:
            raise translate(error, self.endpoints) from error
        if ttl_s <= 0:
            raise LeaseLost(f"lease {lease_id:x} has expired or was revoked")
        return ttl_s

    def _keep_alive_once(self, lease_id: int) -> float:
        """etcd has no unary call for this, so it is a stream of one request and one reply."""
        requests = iter([rpc.LeaseKeepAliveRequest(ID=lease_id)])
        for reply in self._lease.LeaseKeepAlive(requests, self.timeout_s, wait_for_ready=True):
            return float(reply.TTL)
        return 0.0

    async def _call(self, method: Any, request: Any) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        try:
            call = method.future(request, timeout=self.timeout_s, wait_for_ready=True)
        except ValueError as error:  # grpc raises this if the channel is closed
            raise StoreUnavailable("the connection to etcd is closed") from error
        call.add_done_callback(lambda _: _wake(loop, done))
        try:
            await done
            return call.result()
        except grpc.RpcError as error:
            raise translate(error, self.endpoints) from error
        except grpc.FutureCancelledError as error:
            raise StoreUnavailable("the connection to etcd was closed in mid-call") from error
        finally:
            call.cancel()


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


def _target(endpoints: Sequence[str]) -> tuple[str, str]:
    """etcd3 takes one host and one port, and joins them with a colon. Several endpoints go through
    gRPC's ipv4 resolver; the port of the last one is passed as the port. Raises ConfigError."""
    pairs = [_split(endpoint) for endpoint in endpoints]
    if not pairs:
        raise ConfigError("no etcd endpoint is given; pass --etcd HOST:PORT")
    if len(pairs) == 1:
        return pairs[0]
    addresses = [f"{_ipv4(host)}:{port}" for host, port in pairs[:-1]]
    return "ipv4:" + ",".join([*addresses, _ipv4(pairs[-1][0])]), pairs[-1][1]


def _split(endpoint: str) -> tuple[str, str]:
    if endpoint.startswith("https://"):
        raise ConfigError(f"etcd endpoint {endpoint!r}: TLS is not supported yet; use http://")
    host, _, port = endpoint.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"etcd endpoint {endpoint!r} is not HOST:PORT")
    return host, port


def _ipv4(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise StoreUnavailable(f"cannot resolve etcd host {host!r}: {error.strerror}") from error
