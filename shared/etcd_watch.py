"""One watch on an etcd prefix: a thread that loses no event, and its bounded queue to the event
loop.

Theory of operation. The thread reads the prefix (a Snapshot at revision r), watches from r, and
remembers the revision up to which it has delivered everything. If the stream fails (etcd restarts,
its leader changes, the connection breaks), the thread watches again from that revision, and etcd
replays what was missed. If etcd has compacted what came after it, or came back with older data, the
thread reads the prefix again and delivers a new Snapshot. `watch_position` decides all that.

    state     | what happens        | next
    ----------+---------------------+------------------------------------
    snapshot  | range answered      | watching, from its revision
    snapshot  | error               | snapshot, after a jittered backoff
    watching  | events              | watching; deliver, remember revision
    watching  | compacted, or older | snapshot
    watching  | etcd lost what it   | snapshot
              | had told            |
    watching  | error, stream ended | watching, after a jittered backoff
    watching  | etcd refuses us     | the same, with a new token and a longer wait each time
    any       | stop()              | end

If the consumer falls behind, the queue fills up and the thread waits; gRPC's flow control then
holds the rest back in etcd.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc
import structlog

from shared.etcd_client import EtcdClient, watch_request
from shared.etcd_login import has_lapsed
from shared.store import Snapshot, WatchEvent
from shared.watch_position import WatchPosition

log = structlog.get_logger()

_BATCHES_MAX = 256
_BACKOFF_S = (0.1, 0.5)
_REFUSED_BACKOFF_MAX_S = 5.0
_REQUIRE_LEADER = (("hasleader", "true"),)  # an etcd node cut off from its quorum ends the stream
_Batch = list[Snapshot | WatchEvent]


class _Handover:
    """A queue of batches from the thread to the event loop, `_BATCHES_MAX` at most."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._free_batches = threading.Semaphore(_BATCHES_MAX)
        self._batches: deque[_Batch | None] = deque()
        self._arrived = asyncio.Event()

    def offer(self, batch: _Batch, stopped: threading.Event) -> None:
        """Called by the thread; waits while the queue is full."""
        while not self._free_batches.acquire(timeout=0.5):
            if stopped.is_set():
                return
        self._push(batch)

    def end(self) -> None:
        self._push(None)

    def _push(self, batch: _Batch | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._append, batch)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    def _append(self, batch: _Batch | None) -> None:
        self._batches.append(batch)
        self._arrived.set()

    async def take(self) -> _Batch | None:
        """Called on the event loop. None once the watch has ended."""
        while not self._batches:
            self._arrived.clear()
            await self._arrived.wait()
        batch = self._batches.popleft()
        self._free_batches.release()
        return batch


class EtcdWatch:
    """The thread behind one `Store.watch`."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._handover = _Handover(asyncio.get_running_loop())
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._call: Any = None
        self._position = WatchPosition()
        self._refusals = 0  # in a row
        self._token: str | None = None  # with which the last stream began
        self._thread = threading.Thread(target=self._run, name=f"etcd-watch {prefix}", daemon=True)
        self._thread.start()

    async def take(self) -> _Batch | None:
        return await self._handover.take()

    def stop(self) -> None:
        """Idempotent. Does not wait for the thread."""
        self._stopped.set()
        with self._lock:
            if self._call is not None:
                self._call.cancel()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if self._position.revision is None:
                    self._read_snapshot()
                else:
                    self._stream_events(self._position.revision)
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed
                if isinstance(error, grpc.RpcError) and is_refusal(error):
                    self._on_refusal(error.details() or "")
                self._stopped.wait(random.uniform(*_BACKOFF_S))
        self._handover.end()

    def _read_snapshot(self) -> None:
        snapshot = self._client.get_prefix_blocking(self._prefix)
        self._handover.offer([self._position.on_snapshot(snapshot)], self._stopped)

    def _stream_events(self, revision: int) -> None:
        """Returns or raises when the stream has ended. `_position` then says how to go on."""
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put(watch_request(self._prefix, revision))
        login = self._client.login
        if login.needs_renewal:
            login.renew(None)
        self._token = login.token
        metadata = (*_REQUIRE_LEADER, *login.metadata)
        call = self._client.watch_stub.Watch(iter(requests.get, None), metadata=metadata)
        with self._lock:
            self._call = call
        try:
            if not self._stopped.is_set():
                self._deliver(call)
        finally:
            call.cancel()
            requests.put(None)  # ends the thread in which gRPC reads the requests

    def _deliver(self, responses: Iterator[Any]) -> None:
        position = self._position
        for response in responses:
            if response.compact_revision:
                position.on_compacted()
                return
            header = response.header
            if response.created and not position.on_created(header.revision, header.cluster_id):
                return
            if response.canceled:
                self._on_refusal(response.cancel_reason)
                break
            self._refusals = 0
            if news := position.on_events([_event(e) for e in response.events]):
                self._handover.offer(list(news), self._stopped)
            if position.revision is None:
                return
        self._stopped.wait(random.uniform(*_BACKOFF_S))

    def _on_refusal(self, reason: str) -> None:
        """etcd says "permission denied" of a token that it has forgotten, and of roles that have
        just changed, as of what we may not read. So we ask again, less and less often."""
        self._refusals += 1
        log.warning("watch_refused", prefix=self._prefix, reason=reason, times=self._refusals)
        with contextlib.suppress(grpc.RpcError, ValueError):
            self._client.login.renew(self._token)
        if self._refusals > 1:
            self._stopped.wait(min(_BACKOFF_S[0] * 2**self._refusals, _REFUSED_BACKOFF_MAX_S))


def is_refusal(error: grpc.RpcError) -> bool:
    refusals = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
    return has_lapsed(error) or error.code() in refusals


def _event(event: Any) -> WatchEvent:
    deleted = event.type == event.DELETE
    return WatchEvent(
        key=event.kv.key.decode(),
        value=None if deleted else event.kv.value,
        mod_revision=event.kv.mod_revision,
        lease_id=event.kv.lease,
    )
