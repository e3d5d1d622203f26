"""Writes blocks to backup ranks: one thread for all channels, because none of this may cost the
engine's thread more than a call. Which block goes where was decided by those who queued it.

A staging_buffer may be read by its write until the write has ended, and for ever where that ended
by a timeout: then it is lost. After the first write of a channel that does not succeed nothing
more is written over it, but what is under way is waited for, to get its rooms back.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from gpu_worker.exchange.mooncake_engine import TransferEngine
from gpu_worker.kv_replication.channel import Channel, SendRequest
from shared.clock import Clock

log = structlog.get_logger()

WRITES_MAX = 4
"""Under way over a channel: as many as it takes to keep its connection busy while nobody looks, and
no more rooms to lose."""
WRITE_TIMEOUT_S = 3.0
"""A backstop: Mooncake itself ends a write that makes no progress after a second."""
_BATCH_WAIT_S = 0.05
"""From the first block on: a look costs the engine's thread the same for one block as for many …"""
_BATCH_BLOCKS = 4
"""… but the engine waits for rooms where so many blocks of a channel are not on their way."""
_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    send: SendRequest
    batch: int
    until: float


class Sender:
    def __init__(self, engine: TransferEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._wake_condition = threading.Condition()
        self._busy: dict[Channel, None] = {}  # ordered: a set that is fair
        self._writes: defaultdict[Channel, list[_Write]] = defaultdict(list)
        self._failure = ""

    def start(self) -> None:
        """A daemon thread: nobody waits for writes when the process ends."""
        threading.Thread(target=self._run, name="copies", daemon=True).start()

    def notify(self, channel: Channel) -> None:
        """It has something to send. Any thread."""
        with self._wake_condition:
            is_new = channel not in self._busy
            self._busy[channel] = None
            if is_new or len(channel.sends) == _BATCH_BLOCKS:
                self._wake_condition.notify()
        if self._failure:
            channel.fail(self._failure)

    def poll(self) -> bool:
        """Moves everything on. Whether something is left to do. The sender's thread."""
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
        except Exception as error:  # copies are an offer: the rank serves on without
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
                    done.append(write.send)
                else:
                    channel.fail("a write failed")
        if left and self._clock.now() >= left[0].until:
            channel.fail("a write took too long")
        if done:
            channel.wrote(done)
        self._writes[channel] = [*left, *self._begin(channel, WRITES_MAX - len(left))]

    def _begin(self, channel: Channel, num_max: int) -> Sequence[_Write]:
        """Submits what is saved, in order, as far as it may be under way at once."""
        begun: list[_Write] = []
        while channel.sends and channel.sends[0].is_saved():
            if channel.is_open and len(begun) == num_max:
                break
            send = channel.sends.popleft()
            batch = self._submit(channel, send) if channel.is_open else 0
            if batch:
                until = self._clock.now() + WRITE_TIMEOUT_S
                begun.append(_Write(send=send, batch=batch, until=until))
            else:
                channel.give_back(send.staging_buffer)
        return begun

    def _submit(self, channel: Channel, send: SendRequest) -> int:
        """The batch, or 0 where the write could not start."""
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
