"""When the load of experts calls for another placement. Pure: counts of ranks in, the loads that
`heal` plans with out.

Theory of operation. `heal` plans with *loads in use*, which stay as they are until a rebalance
begins; so it converges, and what it has done it does not undo. A rebalance begins when the loads
seen lately would let the slowest ranks finish sooner by more than `threshold`, and takes those into
use. From then on `heal` also moves experts to balance, one step after the other, until nothing is
worth a move. Then nothing is compared for one time constant.

Deaths and joins are healed by the loads in use, without moves for balance alone. As long as no
loads have been seen, `heal` takes them to be even, and balances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from control_plane.judgements import Alarm, AlarmKind
from control_plane.load_meter import LoadMeter
from control_plane.placement import HealPlan, balance
from control_plane.placement.topology import Floats
from shared.errors import WireError
from shared.expert_map import ExpertMap
from shared.records import InstanceSpec
from shared.types import Member
from shared.wire import ExpertCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePolicy:
    enabled: bool = True
    time_constant_s: float = 60.0  # of loads, and the least time between two rebalances
    threshold: float = 0.1  # by how much the busiest ranks of all layers must be relieved
    stuck_s: float = 120.0  # a rebalance that gets no further for so long raises an alarm


class HealGoal(NamedTuple):
    """What `heal` is to plan with: see the theory of operation. `candidate` are loads that would
    begin a rebalance, if they gain more than `threshold`."""

    loads: Floats | None
    balances: bool
    candidate: Floats | None
    threshold: float


class Rebalancer:
    def __init__(self, policy: RebalancePolicy) -> None:
        self._policy = policy
        self.meter: LoadMeter | None = None  # None: the instance's sizes are not known yet
        self.loads: Floats | None = None  # in use
        self._is_balancing = False
        self._compares_from = 0.0
        self._progress_at = 0.0
        self._revision = -1
        self._alarm: Alarm | None = None

    @property
    def is_balancing(self) -> bool:
        return self._is_balancing

    def on_counts(self, member: Member, counts: ExpertCounts, now: float) -> str | None:
        """Returns what is wrong with them, if anything."""
        if self.meter is None:
            return None
        try:
            self.meter.on_counts(member, counts, now)
        except WireError as error:
            return str(error)
        return None

    def on_state(
        self, spec: InstanceSpec, revision: int, members: frozenset[Member], now: float
    ) -> None:
        """The instance, the revision of its map, and all members that may still report."""
        if self.meter is None:
            self.meter = LoadMeter(
                spec.num_moe_layers,
                spec.num_experts,
                time_constant_s=self._policy.time_constant_s,
            )
        self.meter.keep_only(members)
        if revision != self._revision:
            self._revision, self._progress_at = revision, now
        elif self._is_balancing and now - self._progress_at > self._policy.stuck_s:
            self._progress_at = now
            detail = f"a rebalance has got no further for {self._policy.stuck_s:.0f} s"
            self._alarm = Alarm(kind=AlarmKind.REBALANCE_STUCK, detail=detail)

    def is_due(self, expert_map: ExpertMap, now: float) -> bool:
        """Whether to plan although nothing has changed but loads: they are uneven, and it is time
        to compare."""
        if self._is_balancing or now < self._compares_from:
            return False
        self._compares_from = now + self._policy.time_constant_s / 4
        loads = self._seen_loads(now)
        return loads is not None and slowness(expert_map, loads) > 1 + self._policy.threshold

    def goal(self, now: float) -> HealGoal:
        seen = self._seen_loads(now)
        if self.loads is None and seen is not None:
            self.loads = seen
        if self.loads is None:
            return HealGoal(None, True, None, self._policy.threshold)
        candidate = None if self._is_balancing else seen
        return HealGoal(self.loads, self._is_balancing, candidate, self._policy.threshold)

    def on_planned(self, goal: HealGoal, plan: HealPlan, now: float) -> None:
        if plan.takes_candidate:
            self.loads, self._is_balancing = goal.candidate, True
            self._progress_at = now
        elif plan.step is None and self._is_balancing and goal.balances:
            self._is_balancing = False
            self._compares_from = now + self._policy.time_constant_s

    def take_alarms(self) -> list[Alarm]:
        alarm, self._alarm = self._alarm, None
        return [] if alarm is None else [alarm]

    def _seen_loads(self, now: float) -> Floats | None:
        if not self._policy.enabled or self.meter is None or not self.meter.is_spread:
            return None
        return self.meter.loads(now)


def slowness(expert_map: ExpertMap, loads: Floats) -> float:
    """How much longer the layers take than with evenly loaded ranks: the busiest rank's load over
    the mean, averaged over layers. Ranks wait for each other in every layer."""
    ranks = [m.rank for m in expert_map.members]
    return float(np.mean(balance(expert_map.placement, loads, ranks))) if loads.size else 1.0
