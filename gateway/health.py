"""Whether this gateway can serve, and if not, why: for load balancers and for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from gateway.cluster_view import ClusterView
from gateway.model_loader import ModelLoader
from gateway.session_driver import SessionDriver
from shared.clock import Clock
from shared.types import Member, RankState

RECOVERY_MAX_S = 3.0
"""A lost rank is usually out of the map after a fraction of a second. Until then requests wait."""
STALL_MAX_S = 3.0
"""Ranks finish many steps a second."""


class ServingState(Enum):
    SERVING = "serving"
    SCALING = "scaling"  # ranks join the map, or are drained so that they can leave it
    RECOVERING = "recovering"  # the map names a rank that is lost
    STOPPED = "stopped"


class Health:
    """A gateway that answers at all is live. It is ready if a request that is sent now would run:
    if there are no reasons against it."""

    def __init__(self, driver: SessionDriver, models: ModelLoader, clock: Clock) -> None:
        self._driver = driver
        self._models = models
        self._clock = clock
        self._gone_at: dict[Member, float] = {}
        self.draining = False
        self.refuses = False  # who asks now cannot reach another gateway by asking again

    def report(self) -> dict[str, Any]:
        """The body of `/health`. `since_s`: for how long a recovery has gone on."""
        reasons = self.reasons_not_ready()
        lost = self._lost_ranks()
        joining = _joining(self._driver.view)
        draining = sorted(member.rank for member in self._driver.draining_ranks())
        if reasons and not lost:
            state = ServingState.STOPPED
        elif lost:
            state = ServingState.RECOVERING
        else:
            state = ServingState.SCALING if joining or draining else ServingState.SERVING
        return {
            "status": "not_ready" if reasons else "ready",
            "live": True,
            "state": state.value,
            "since_s": round(self._age_s(lost.values()), 3) if lost else None,
            "lost_ranks": sorted(member.rank for member in lost),
            "joining_ranks": joining,
            "draining_ranks": draining,
            "missing_ranks": _missing(self._driver.view),
            "reasons": reasons,
        }

    def reasons_not_ready(self) -> list[str]:
        """What is being waited for, one sentence each. A gateway that has just started knows
        nothing of the instance yet, and does not say of anything that it does not exist."""
        reasons = ["shutting down"] if self.draining else []
        view = self._driver.view
        if not view.is_read:
            return [*reasons, "this gateway has just started and has not read etcd yet"]
        if view.spec is None:
            reasons.append("the control plane has written no spec yet")
        elif self._models.served is None:
            reasons.append("the tokenizer is loading")
        if not view.members:
            reasons.append(f"no expert map is published yet: {_progress(view)}")
        elif not self._driver.live_ranks():
            reasons.append(
                f"none of the {len(view.members)} ranks of the map is connected: {_progress(view)}"
            )
        else:
            reasons += self._reasons_of_map(view)
        return reasons

    def _reasons_of_map(self, view: ClusterView) -> list[str]:
        """What keeps the ranks of the map from stepping."""
        reasons = []
        uncovered = view.num_uncovered(self._driver.live_ranks())
        if uncovered:
            reasons.append(
                f"{uncovered} experts have no replica on a live rank: survivors load them, or a "
                "lost rank returns"
            )
        lost = self._lost_ranks()
        if lost and self._age_s(lost.values()) > RECOVERY_MAX_S:
            reasons.append(
                f"recovering for {self._age_s(lost.values()):.0f} s: no map without rank "
                f"{_names(lost)} is published yet; is a control plane running?"
            )
        stalled = self._driver.stalled_ranks(STALL_MAX_S)
        if stalled:
            reasons.append(
                f"rank {_names(stalled)} has finished no step for "
                f"{self._age_s(stalled.values()):.0f} s"
            )
        return reasons

    def _lost_ranks(self) -> dict[Member, float]:
        """Members of the map whose link is broken, or that have neither a link nor a record, with
        the time since when: so a gateway that has just started, and never had the link, says the
        same as the others."""
        now, view = self._clock.now(), self._driver.view
        known = {*(record.member for record in view.ranks.values()), *self._driver.live_ranks()}
        self._gone_at = {m: self._gone_at.get(m, now) for m in view.members if m not in known}
        return {**self._gone_at, **self._driver.lost_ranks()}

    def _age_s(self, times: Iterable[float]) -> float:
        return self._clock.now() - min(times)


def _names(members: Mapping[Member, float]) -> str:
    return ", ".join(str(member.rank) for member in sorted(members))


def _joining(view: ClusterView) -> list[int]:
    """Ranks of which a registered incarnation is in no map yet, although there is one. Those that
    have been drained wait outside it on purpose."""
    if not view.members:
        return []
    return sorted(
        {
            record.rank
            for record in view.ranks.values()
            if record.member not in view.members and view.desired.drain_of(record.rank) is None
        }
    )


def _missing(view: ClusterView) -> list[int]:
    """Ranks that the instance should have, and of which nothing runs that has registered."""
    if view.spec is None:
        return []
    known = {r.rank for r in view.ranks.values()} | {member.rank for member in view.members}
    return sorted(set(view.desired.rank_ids(view.spec.num_ranks)) - known)


def _progress(view: ClusterView) -> str:
    registered = {record.rank for record in view.ranks.values()}
    ready = {r.rank for r in view.ranks.values() if r.state is RankState.READY}
    num_ranks = f" of {view.spec.num_ranks}" if view.spec is not None else ""
    return f"{len(registered)}{num_ranks} ranks are registered, {len(ready)} of them ready"
