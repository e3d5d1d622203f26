"""Which peers do not answer this rank, asked over its own links to them. Pure. A peer that answers
everybody else is not dead: the way between the two is cut, and only the control plane, which hears
both, can tell."""

from __future__ import annotations

from collections.abc import Iterable

from shared.types import Member
from shared.wire import UnheardPeer

OWN_PAUSE_S = 0.1
"""Answers may be unread if this process has not looked for so long: that time does not count."""
LOOK_S = 0.05


class PeerEchoes:
    """Call `on_look` every LOOK_S while `is_waiting`."""

    def __init__(self) -> None:
        self._asked_at: dict[Member, float] = {}  # of the questions that have no answer yet
        self._looked_at = 0.0

    @property
    def is_waiting(self) -> bool:
        return bool(self._asked_at)

    def ask(self, peers: Iterable[Member], now: float) -> list[Member]:
        """Those of them to be asked now: the others have been, and have not answered."""
        if not self._asked_at:
            self._looked_at = now
        fresh = [peer for peer in peers if peer not in self._asked_at]
        self._asked_at.update(dict.fromkeys(fresh, now))
        return fresh

    def on_answer(self, peer: Member) -> None:
        self._asked_at.pop(peer, None)

    def forget(self, peer: Member) -> None:
        """It is gone, or the link to it is no longer open."""
        self._asked_at.pop(peer, None)

    def on_look(self, now: float) -> None:
        gap_s = now - self._looked_at
        self._looked_at = now
        if gap_s > OWN_PAUSE_S:
            self._asked_at = {peer: at + gap_s for peer, at in self._asked_at.items()}

    def unheard(self, now: float) -> tuple[UnheardPeer, ...]:
        return tuple(
            UnheardPeer(rank=peer.rank, for_ms=max(0.0, now - at) * 1000)
            for peer, at in self._asked_at.items()
        )
