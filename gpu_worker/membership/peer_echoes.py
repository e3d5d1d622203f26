"""Which peers do not answer this rank, asked over its own links to them. Pure. A peer that answers
everybody else is not dead: the way between the two is cut, and only the control plane, which hears
both, can tell.

A peer that does not answer is asked again at each look. One question that is lost would be sent
again by TCP after 0.2 s at the earliest; those that follow it make TCP see at once that it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from shared.rhythm import Rhythm
from shared.types import Member
from shared.wire import UnheardPeer

OWN_PAUSE_S = 0.1
"""Answers may be unread if this process has not looked for so long: that time does not count."""
LOOK_S = 0.02
PATIENCE_MAX_S = 0.25
_TIMES_USUAL = 3.0


class PeerEchoes:
    """Call `on_look` every LOOK_S while `is_waiting`."""

    def __init__(self, now: float) -> None:
        self._asked_at: dict[Member, float] = {}  # of the first question that has no answer yet
        self._looked_at = now
        self._rhythm = Rhythm(now)

    @property
    def is_waiting(self) -> bool:
        return bool(self._asked_at)

    def ask(self, peers: Iterable[Member], now: float) -> list[Member]:
        """Those of them to be asked now: the others have been, and are asked again by `on_look`."""
        if not self._asked_at:
            self._looked_at = now
        fresh = [peer for peer in peers if peer not in self._asked_at]
        self._asked_at.update(dict.fromkeys(fresh, now))
        return fresh

    def on_answer(self, peer: Member, now: float) -> None:
        asked_at = self._asked_at.pop(peer, None)
        if asked_at is not None:
            self._rhythm.observe(now - asked_at, now)

    def forget(self, peer: Member) -> None:
        """It is gone, or the link to it is no longer open."""
        self._asked_at.pop(peer, None)

    def on_look(self, now: float) -> list[Member]:
        """Those to be asked again."""
        gap_s = now - self._looked_at
        self._looked_at = now
        if gap_s > OWN_PAUSE_S:
            self._asked_at = {peer: at + gap_s for peer, at in self._asked_at.items()}
        return list(self._asked_at)

    def unheard(self, now: float) -> tuple[UnheardPeer, ...]:
        """For how long beyond what answers usually take here, of which PATIENCE_MAX_S is granted at
        most: after a pause of a peer they are said to take long."""
        patience_s = min(_TIMES_USUAL * self._rhythm.usual_s(now), PATIENCE_MAX_S)
        return tuple(
            UnheardPeer(rank=peer.rank, for_ms=max(0.0, now - at - patience_s) * 1000)
            for peer, at in self._asked_at.items()
        )
