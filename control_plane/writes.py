"""What membership may decide: fenced writes to etcd, and one computation that is too long for the
event loop. `publisher` turns a write into a transaction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from control_plane.cluster_state import ClusterState
from control_plane.placement import HealPlan, HealStep, heal
from control_plane.placement.topology import Floats
from control_plane.rebalancer import HealGoal, slowness
from shared.desired_state import DesiredState
from shared.expert_map import ExpertMap
from shared.records import SlotContents, Verdict
from shared.types import NodeId, ProcessState, RankId, SuspicionReason

TOLERANCE = 0.05
"""Of a layer's busiest rank, above the mean load."""
FORESEEN_LOADS_MAX = 256
"""A rebalance is foreseen for so many loads of experts: more would take too long to plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishMap:
    """One transaction: the map, the verdicts on the members that it leaves out, and assignments."""

    expert_map: ExpertMap
    verdicts: tuple[Verdict, ...] = ()
    assignments: tuple[SlotContents, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclareDead:
    """Verdicts before there is a map without the dead: too few ranks are left to hold all experts,
    or survivors are still loading what the dead held. An incarnation that was judged dead but is
    alive learns of it and restarts as a new one. The others learn for whom to wait no longer."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """What ranks are to load. After a death, the orphans, before a map can follow, together with
    the verdicts on the dead: nobody waits for the dead meanwhile, and every rank knows of the death
    before a slot is overwritten to which it might still send tokens."""

    assignments: tuple[SlotContents, ...]
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteKeys:
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishDesired:
    """The next desired state. Its transaction compares the revision of the one before."""

    desired: DesiredState
    cause: str  # in words, for the log


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanHeal:
    """No write, but a computation that is too long for the event loop. Its result comes back
    through `Membership.on_heal_planned`; deaths are decided meanwhile."""

    expert_map: ExpertMap
    map_revision: int
    nodes: dict[RankId, NodeId]
    budget_bytes: int
    bytes_per_expert: int
    redundant: int
    survive: int
    goal: HealGoal

    def compute(self) -> HealPlan:
        tolerance = TOLERANCE if self.goal.balances else math.inf
        step = next(self._steps(self.goal.loads, tolerance), None)
        if step is not None or self.goal.candidate is None:
            return HealPlan(step)
        return self._rebalance(self.goal.candidate)

    def _rebalance(self, loads: Floats) -> HealPlan:
        """The first step, if all of them together gain enough."""
        before = slowness(self.expert_map, loads)
        first, after, num_loads = None, before, 0
        for step in self._steps(loads, TOLERANCE):
            first = first or step
            after = slowness(replace(self.expert_map, placement=step.placement), loads)
            num_loads += len(step.slot_fills)
            if num_loads >= FORESEEN_LOADS_MAX:
                break
        if first is None or before <= after * (1 + self.goal.threshold):
            return HealPlan(None)
        return HealPlan(first, takes_candidate=True, slowness=(before, after))

    def _steps(self, loads: Floats | None, tolerance: float) -> Iterator[HealStep]:
        return heal(
            self.expert_map,
            loads,
            self.nodes,
            budget_bytes=self.budget_bytes,
            bytes_per_expert=self.bytes_per_expert,
            redundant=self.redundant,
            survive=self.survive,
            tolerance=tolerance,
        )


Write = PublishMap | DeclareDead | Assign | DeleteKeys | PublishDesired
Decision = Write | PlanHeal


def stopped_verdicts(
    write: PublishMap | DeclareDead | Assign, state: ClusterState
) -> list[Verdict]:
    """The verdicts that follow from the silence of a process that is stopped, as far as its node
    agent has said. If it says that the process goes on, they do not stand."""
    return [
        verdict
        for verdict in write.verdicts
        if verdict.cause is not SuspicionReason.EXIT
        and (view := state.views.get(verdict.member)) is not None
        and view.state is ProcessState.STOPPED
    ]
