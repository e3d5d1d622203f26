"""Which suspicions of peers this rank has published, and which of them it still holds. Pure. A
suspicion that stays in etcd when its reason has gone would count as a fresh one for the next
leader."""

from __future__ import annotations

from collections.abc import Collection

from shared.types import Epoch, Member, Step, SuspicionReason

REPEAT_S = 0.25
"""Peers that wait suspect one another in every step: etcd need not hear of each."""
KEPT_S = 1.0
"""A suspicion stays for this long at least: those who watch etcd may look late."""
LOOK_S = 0.5


class PeerSuspicions:
    """Call `on_look` every LOOK_S while `peers` is not empty."""

    def __init__(self) -> None:
        self._published_at: dict[Member, dict[SuspicionReason, float]] = {}
        self._looked_at_step = (Epoch(0), Step(0))

    @property
    def peers(self) -> Collection[Member]:
        """Those for whom a suspicion of ours is in etcd."""
        return self._published_at.keys()

    def on_suspected(self, peer: Member, reason: SuspicionReason, now: float) -> bool:
        """Whether to publish it: not if the same was published less than REPEAT_S ago."""
        reasons = self._published_at.setdefault(peer, {})
        if now - reasons.get(reason, -REPEAT_S) < REPEAT_S:
            return False
        reasons[reason] = now
        return True

    def on_look(
        self,
        now: float,
        *,
        at_step: tuple[Epoch, Step],
        waiting_for: Collection[Member],
        linked: Collection[Member],
    ) -> list[Member]:
        """The peers whose suspicion is to be withdrawn. It is held while the link to the peer is
        not open, and while this rank waits for the peer in the very step of the last look: in a
        step that goes on, everybody waits for a moment."""
        has_moved = at_step != self._looked_at_step
        self._looked_at_step = at_step
        withdrawn = [
            peer
            for peer, reasons in self._published_at.items()
            if now - max(reasons.values()) >= KEPT_S
            and peer in linked
            and (has_moved or peer not in waiting_for)
        ]
        for peer in withdrawn:
            del self._published_at[peer]
        return withdrawn

    def forget(self, peer: Member) -> None:
        """It is gone, and every suspicion of it."""
        self._published_at.pop(peer, None)
