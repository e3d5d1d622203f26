"""The times of this rank's last changes of epoch, from which a recovery's breakdown is computed."""

from __future__ import annotations

from dataclasses import replace

from shared.types import Epoch
from shared.wire import Adoption

KEPT_MAX = 16


class AdoptionLog:
    """Written by the engine thread. Any thread may read `entries`, because it is replaced whole."""

    def __init__(self) -> None:
        self.entries: tuple[Adoption, ...] = ()  # oldest first
        self._awaits_replay = False

    def record_adoption(
        self, epoch: Epoch, *, seen_at: float, now: float, abandoned: bool
    ) -> Adoption:
        entry = Adoption(
            epoch=epoch, seen_at=seen_at, adopted_at=now, replayed_at=0.0, abandoned=abandoned
        )
        self.entries = (*self.entries[1 - KEPT_MAX :], entry)
        self._awaits_replay = True
        return entry

    def record_commit(self, *, now: float, num_reprefilled: int) -> None:
        """A step of the newest epoch was committed."""
        if not self._awaits_replay and not num_reprefilled:
            return
        last = self.entries[-1]
        self.entries = (
            *self.entries[:-1],
            replace(
                last,
                replayed_at=now if self._awaits_replay else last.replayed_at,
                reprefill_tokens=last.reprefill_tokens + num_reprefilled,
            ),
        )
        self._awaits_replay = False
