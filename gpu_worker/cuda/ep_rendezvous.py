"""How ranks find each other's exchange buffers: the four calls that Mooncake's elastic Buffer makes
on a store, answered by etcd through our own Store. No rank hosts anything.

What travels is our own record in msgpack: the Buffer's pickles never reach etcd, and nothing that
stands there is ever unpickled.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from shared.codec import pack, unpack
from shared.errors import StoreError
from shared.keys import Keys
from shared.records import ExchangeHandles
from shared.store import Snapshot, Store
from shared.types import Member, RankId

T = TypeVar("T")

_BUFFER_PREFIX = "MOONCAKE_EP"
_CALL_TIMEOUT_S = 10.0


class RendezvousTimeout(StoreError):
    """A peer told nothing of its buffer in time."""


class Peer(NamedTuple):
    """A life to meet. `generation` counts the meetings of the same two lives, from 0; both sides
    must name the same one."""

    member: Member
    generation: int = 0


class EpRendezvous:
    """The Buffer's store argument. Its methods run on the thread that calls `connect_ranks` and
    wait for the event loop `loop`, which must be another thread's.

    The Buffer names keys by rank; here they are names of two lives and a generation, as `expect`
    has told. Own records live as long as the lease `lease_id`.
    """

    def __init__(
        self,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        keys: Keys,
        member: Member,
        *,
        lease_id: int,
    ) -> None:
        self._store = store
        self._loop = loop
        self._keys = keys
        self._member = member
        self._lease_id = lease_id
        self._peers: dict[RankId, Peer] = {}
        self._found: dict[str, bytes] = {}

    def expect(self, peers: Mapping[RankId, Peer]) -> None:
        """Meet these lives from now on. Peers not named keep what was told of them before."""
        self._peers.update(peers)

    def set(self, key: str, value: bytes) -> None:
        """Raises StoreUnavailable, LeaseLost."""
        record = pack(_to_handles(value))
        put = self._store.put(self._etcd_key(key), record, lease_id=self._lease_id)
        self._run(put, _CALL_TIMEOUT_S)

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Until all of `keys` stand. Raises RendezvousTimeout."""
        wanted = frozenset(self._etcd_key(key) for key in keys)
        seconds = timeout.total_seconds()
        self._run(self._collect(wanted, seconds), seconds + _CALL_TIMEOUT_S)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """What `wait` has found, in the order of `keys`."""
        return [_to_envelope(unpack(self._found[self._etcd_key(k)], ExchangeHandles)) for k in keys]

    def delete_key(self, key: str) -> bool:
        """A record is for one reader, who has read it."""
        etcd_key = self._etcd_key(key)
        self._found.pop(etcd_key, None)
        return self._run(self._store.delete(etcd_key), _CALL_TIMEOUT_S)

    async def _collect(self, wanted: frozenset[str], timeout_s: float) -> None:
        missing = wanted - self._found.keys()
        try:
            async with asyncio.timeout(timeout_s):
                async with aclosing(
                    self._store.watch(self._keys.exchange_handles(self._member))
                ) as events:
                    async for event in events:
                        told = event.values if isinstance(event, Snapshot) else (event,)
                        for entry in told:
                            if entry.key in missing and entry.value is not None:
                                self._found[entry.key] = entry.value
                                missing -= {entry.key}
                        if not missing:
                            return
        except TimeoutError:
            names = ", ".join(sorted(missing))
            raise RendezvousTimeout(
                f"no exchange handles after {timeout_s:.1f} s: {names}"
            ) from None

    def _etcd_key(self, key: str) -> str:
        """The Buffer's `MOONCAKE_EP/SOURCE/TARGET`, with ranks, as a key of ours."""
        prefix, source, target = key.split("/")
        assert prefix == _BUFFER_PREFIX, f"the Buffer asks for {key!r}"
        if int(source) == self._member.rank:
            peer = self._peers[RankId(int(target))]
            return self._keys.exchange_handle(peer.member, self._member, peer.generation)
        peer = self._peers[RankId(int(source))]
        return self._keys.exchange_handle(self._member, peer.member, peer.generation)

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise


def _to_handles(envelope: bytes) -> ExchangeHandles:
    """Of our own process's Buffer, so its pickle may be trusted."""
    host, (address, key, subnet, interface, queue_pairs, local_ids, ipc) = pickle.loads(envelope)
    return ExchangeHandles(
        host=host,
        address=address,
        remote_key=key,
        subnet_prefix=subnet,
        interface_id=interface,
        queue_pairs=tuple(queue_pairs),
        local_ids=tuple(local_ids),
        ipc_handle=tuple(ipc),
    )


def _to_envelope(handles: ExchangeHandles) -> bytes:
    metadata = (
        handles.address,
        handles.remote_key,
        handles.subnet_prefix,
        handles.interface_id,
        handles.queue_pairs,
        handles.local_ids,
        handles.ipc_handle,
    )
    return pickle.dumps((handles.host, metadata))
