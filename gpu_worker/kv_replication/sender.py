"""Writes blocks to backup ranks: one thread for all channels, so that a write costs the engine's
thread no more than a call. Which block goes where is decided by the caller that queued it.

A staging buffer may be read by its write until the write has ended. If a write times out, it may
read its buffer at any later time, so the buffer is lost. After the first failed write of a channel
nothing more is written over it, but pending writes are waited for, to get their buffers back."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from gpu_worker.exchange.mooncake_engine import TransferEngine
from gpu_worker.kv_replication.block_tags import BlockTags
from gpu_worker.kv_replication.channel import Channel, SendRequest, StoredBlock
from shared.clock import Clock

log = structlog.get_logger()

WRITES_MAX = 4
"""Pending writes of a channel: enough to keep its connection busy between two polls, and few
staging buffers to lose."""
WRITE_TIMEOUT_S = 3.0
"""A backstop: Mooncake itself ends a write that makes no progress for a second."""
_BATCH_WAIT_S = 0.05
"""How long the sender waits for more blocks after the first: a wake-up costs the engine's thread
the same for one block as for many …"""
_BATCH_BLOCKS = 4
"""… unless this many blocks of a channel are queued: the engine would run out of staging
buffers."""
_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    send: SendRequest
    tag: bytes
    batch: int
    until: float


class Sender:
    """Owns the writes of all channels."""

    def __init__(self, engine: TransferEngine, clock: Clock, tags: BlockTags) -> None:
        self._engine = engine
        self._tags = tags
        self._clock = clock
        self._wake_condition = threading.Condition()
        self._busy: dict[Channel, None] = {}  # an ordered set: channels are served fairly
        self._writes: defaultdict[Channel, list[_Write]] = defaultdict(list)
        self._failure = ""

    def start(self) -> None:
        """A daemon thread: nobody waits for writes when the process ends."""
        threading.Thread(target=self._run, name="kv-sender", daemon=True).start()

    def notify(self, channel: Channel) -> None:
        """The channel has something to send. Any thread."""
        with self._wake_condition:
            is_new = channel not in self._busy
            self._busy[channel] = None
            if is_new or len(channel.sends) == _BATCH_BLOCKS:
                self._wake_condition.notify()
        if self._failure:
            channel.fail(self._failure)

    def poll(self) -> bool:
        """Advances all writes. Whether something is left to do. The sender's thread only."""
        with self._wake_condition:
            busy = list(self._busy)
        for channel in busy:
            self._advance(channel)
        with self._wake_condition:
            for channel in busy:
                if not channel.sends and not self._writes[channel]:
                    del self._busy[channel], self._writes[channel]
            return bool(self._busy)

    def _run(self) -> None:
        try:
            while True:
                with self._wake_condition:
                    self._wake_condition.wait_for(lambda: self._busy)
                    self._wake_condition.wait_for(self._has_full_batch, _BATCH_WAIT_S)
                while self.poll():
                    time.sleep(_POLL_S)
        except Exception as error:  # replicas are optional: the rank serves on without them
            log.exception("kv_replication_disabled")
            self._failure = f"the sender has ended: {error}"
            with self._wake_condition:
                busy = list(self._busy)
            for channel in busy:
                channel.fail(self._failure)

    def _has_full_batch(self) -> bool:
        return any(len(channel.sends) >= _BATCH_BLOCKS for channel in self._busy)

    def _advance(self, channel: Channel) -> None:
        done, left = [], []
        for write in self._writes[channel]:
            status = self._engine.transfer_check_status(write.batch)
            if status == 0:
                left.append(write)
            elif status == -2:
                channel.lose_staging_buffer()
            else:
                channel.give_back(write.send.staging_buffer)
                if status == 1:
                    done.append(StoredBlock(write.send.slot, write.send.name, write.tag))
                else:
                    channel.fail("a write failed")
        if left and self._clock.now() >= left[0].until:
            channel.fail("a write took too long")
        if done:
            channel.wrote(done)
        self._writes[channel] = [*left, *self._begin(channel, WRITES_MAX - len(left))]

    def _begin(self, channel: Channel, num_max: int) -> Sequence[_Write]:
        """Submits saved blocks in order, up to `num_max` writes."""
        begun: list[_Write] = []
        while channel.sends and channel.sends[0].is_saved():
            if channel.is_open and len(begun) == num_max:
                break
            send = channel.sends.popleft()
            tag = self._tags.tag(send.name, send.staging_buffer) if channel.is_open else b""
            batch = self._submit(channel, send) if channel.is_open else 0
            if batch:
                until = self._clock.now() + WRITE_TIMEOUT_S
                begun.append(_Write(send=send, tag=tag, batch=batch, until=until))
            else:
                channel.give_back(send.staging_buffer)
        return begun

    def _submit(self, channel: Channel, send: SendRequest) -> int:
        """The batch, or 0 if the write could not start."""
        remote = channel.remote
        batch = self._engine.transfer_submit_write(
            remote.transfer_name,
            int(send.staging_buffer.ctypes.data),
            remote.address + send.slot * remote.block_bytes,
            remote.block_bytes,
        )
        if not batch:
            channel.fail("a write could not start")
        return batch
