"""The agent's own record in etcd: besides what never changes it tells whether the agent leaves, and
which of its ranks wait for their next start, until when and why."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from node_agent.rank_supervisor import RankWait
from shared.clock import Clock
from shared.exit_codes import describe_exit
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.records import AgentRecord, WaitingRank, pack_record
from shared.types import NodeId, RankId

TOLD_FROM_FAILURES = 2
"""A single death is over before anybody has read of it."""
_WHY_CHARS_MAX = 300
_LOG_TAIL_BYTES = 8 << 10
_SAID = "starfish rank: "


@dataclass(slots=True, kw_only=True)
class OwnRecord:
    """Call `put` once at the start; the others do it when something has changed."""

    record: AgentRecord
    leased: LeasedKeys
    keys: Keys
    clock: Clock

    @property
    def node(self) -> NodeId:
        return self.record.node

    def put(self) -> None:
        self.leased.put(self.keys.agent(self.node), pack_record(self.record))

    def leave(self) -> None:
        self.record = replace(self.record, leaving=True)
        self.put()

    def on_waits(self, rank: RankId, wait: RankWait | None, why: str) -> None:
        """`wait` is in the clock's `now`; None: it waits for no process."""
        if wait is None or wait.failures < TOLD_FROM_FAILURES:
            self.on_gone(rank)
            return
        until = round(self.clock.wall() + wait.until - self.clock.now(), 1)
        waiting = WaitingRank(rank=rank, until=until, why=why[:_WHY_CHARS_MAX])
        self._set_waiting((*self._others(rank), waiting))

    def on_gone(self, rank: RankId) -> None:
        """It has registered, or needs no process."""
        self._set_waiting(self._others(rank))

    def on_wanted(self, ranks: Collection[RankId]) -> None:
        """No other shall run here."""
        self._set_waiting(tuple(each for each in self.record.waiting if each.rank in ranks))

    def _others(self, rank: RankId) -> tuple[WaitingRank, ...]:
        return tuple(each for each in self.record.waiting if each.rank != rank)

    def _set_waiting(self, waiting: tuple[WaitingRank, ...]) -> None:
        if waiting != self.record.waiting:
            self.record = replace(self.record, waiting=waiting)
            self.put()


def why_it_ended(exit_code: int | None, log: Path | None) -> str:
    """In a few words. What the process has said last is the reason only if it ended by itself."""
    if exit_code == -signal.SIGKILL:
        return "its process was killed by SIGKILL, as the kernel does when memory runs out"
    said = None if log is None or (exit_code or 0) < 0 else _last_words(log)
    if said is not None:
        return said
    where = f"; see {log}" if log is not None else ""
    return f"its process {describe_exit(exit_code)}{where}"


def _last_words(log: Path) -> str | None:
    """The message with which a rank that cannot go on exits, if that is the log's last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return None
    last = lines[-1] if lines else ""
    return last.removeprefix(_SAID) if last.startswith(_SAID) else None
