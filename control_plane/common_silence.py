"""Which silences have a cause that is no member's: a paused host, or our own link. Pure: it knows
which hosts have stood still, and for how long a silence may last is said by `silence`."""

from __future__ import annotations

from collections.abc import Collection
from math import inf

from control_plane.detector_timings import DetectorTimings
from control_plane.watched_member import ProbeState, WatchedMember
from shared.types import NodeId


class CommonSilence:
    """All times are in the detector's attentive seconds."""

    def __init__(self, timings: DetectorTimings) -> None:
        self._timings = timings
        self._paused_attentive_s: dict[NodeId, float] = {}  # when a host last was

    def on_host_gap(self, node: NodeId, gap_s: float, attentive_s: float) -> None:
        """For so long `node`'s agent has not run."""
        if gap_s >= self._timings.host_gap_min_s:
            self._paused_attentive_s[node] = attentive_s

    def is_host_silent(
        self, watched: WatchedMember, members: Collection[WatchedMember], attentive_s: float
    ) -> bool:
        """Whether the whole host is quiet or stopped, or its node agent itself did not run. If most
        members are stopped at once, something has stopped their hosts; so it is with the last
        member of all: nobody answers who could show that its host runs, nobody waits for it, and
        its sessions can go nowhere else."""
        if watched.is_stopped and 2 * sum(w.is_stopped for w in members) > len(members):
            return True
        if watched.node is None:
            return False
        paused_attentive_s = self._paused_attentive_s.get(watched.node, -inf)
        if attentive_s - paused_attentive_s < self._timings.silence.host_pause_s:
            return True
        others = [
            w
            for w in members
            if w.node == watched.node and w is not watched and not w.is_never_probed
        ]
        asked_attentive_s = urgent_since_attentive_s(members)
        return bool(others) and all(
            self._is_quiet(other, asked_attentive_s, attentive_s) for other in others
        )

    def _is_quiet(
        self, watched: WatchedMember, asked_attentive_s: float | None, attentive_s: float
    ) -> bool:
        """Stopped, or asked and not heard, and its node agent does not say that it runs."""
        if watched.is_stopped:
            return True
        view = watched.view_at(attentive_s, self._timings.view_age_max_s)
        if asked_attentive_s is None or view is not None:
            return False
        heard_attentive_s = max(watched.pong_attentive_s, asked_attentive_s)
        return attentive_s - heard_attentive_s >= self._timings.quiet_s

    def is_own_link_suspect(self, members: Collection[WatchedMember], attentive_s: float) -> bool:
        """Whether more than half of the members have not answered for the whole window, though they
        were probed at the urgent interval and show no other sign of death."""
        asked_attentive_s = urgent_since_attentive_s(members)
        if asked_attentive_s is None:
            return False
        asked = [w for w in members if not w.is_never_probed]
        heard_nothing = [
            w
            for w in asked
            if w.probe in (ProbeState.CONNECTED, ProbeState.UNTRIED)
            and not w.is_stopped
            and attentive_s - max(w.pong_attentive_s, asked_attentive_s) >= self._timings.own_link_s
        ]
        return 2 * len(heard_nothing) > len(asked)


def urgent_since_attentive_s(members: Collection[WatchedMember]) -> float | None:
    """Since when all members are probed at the urgent interval."""
    return min(
        (w.suspected_attentive_s for w in members if w.suspected_attentive_s is not None),
        default=None,
    )
