"""When experts are moved without a death, and which step comes next: once nothing has changed for a
while, or at once if somebody asked for it. `Rebalancer` says for which loads. Pure; the planner's
long computation runs elsewhere, and `Membership` turns a step into writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from control_plane.cluster_state import ClusterState
from control_plane.placement import HealPlan, HealStep
from control_plane.rebalancer import Rebalancer
from control_plane.residency import Residency
from control_plane.writes import PlanHeal
from shared.expert_map import ExpertMap
from shared.types import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class HealPolicy:
    """See `MembershipPolicy`."""

    bytes_per_expert: int
    survive: int
    after_s: float
    joiner_timeout_s: float
    budget_bytes: int


class RebalanceProgress(NamedTuple):
    """`done` is the count of `DesiredState.rebalances` for which no step is left, 0 if this term
    does not know yet. `num_steps` have been planned for the newest one that it has planned."""

    done: int = 0
    num_steps: int = 0


class Healing:
    def __init__(self, policy: HealPolicy, rebalancer: Rebalancer) -> None:
        self._policy = policy
        self._rebalancer = rebalancer
        self._first_seen: dict[Member, float] = {}
        self._quiet_since = 0.0
        self._quiet_state: object = None
        self._planning_revision = -1
        self._planned: tuple[int, HealPlan] | None = None
        self._planned_for: int | None = None  # the `rebalances` that the newest plan knew of
        self._rebalances_done: int | None = None  # None: this term has not begun
        self._counted_for: int | None = None
        self.rebalance = RebalanceProgress()

    def note(self, state: ClusterState, now: float) -> None:
        """Before each `next_step`."""
        expert_map = state.expert_map
        kept = {*state.records, *(expert_map.members if expert_map else ())}
        for member in state.records:
            self._first_seen.setdefault(member, now)
        self._first_seen = {m: t for m, t in self._first_seen.items() if m in kept}
        quiet_state = (_map_revision(state), frozenset(state.records))
        if quiet_state != self._quiet_state:
            self._quiet_state, self._quiet_since = quiet_state, now
        if self._rebalances_done is None:
            self._rebalances_done = state.desired.rebalances  # the usual heal does them, later
        if state.spec is not None:
            self._rebalancer.on_state(state.spec, _map_revision(state), frozenset(kept), now)

    def on_planned(self, request: PlanHeal, plan: HealPlan, now: float) -> None:
        self._planning_revision = -1
        self._planned = (request.map_revision, plan)
        if self._planned_for is not None:
            self._note_rebalance(self._planned_for, plan)
        self._rebalancer.on_planned(request.goal, plan, now)

    def _note_rebalance(self, planned_for: int, plan: HealPlan) -> None:
        if planned_for != self._counted_for:
            self._counted_for = planned_for
            self.rebalance = self.rebalance._replace(num_steps=0)
        if plan.step is None:
            self.rebalance = self.rebalance._replace(done=planned_for)
        elif self.rebalance.done != planned_for:  # else the step comes for another reason
            self.rebalance = self.rebalance._replace(num_steps=self.rebalance.num_steps + 1)

    def nothing_to_move(self, state: ClusterState) -> bool:
        """Whether that is known of the present map."""
        plan = self._plan_under(_map_revision(state))
        return plan is not None and plan.step is None

    def next_step(
        self, residency: Residency, expert_map: ExpertMap, newcomers: Sequence[Member], now: float
    ) -> PlanHeal | HealStep | None:
        state = residency.state
        revision = _map_revision(state)
        if self._planning_revision == revision or not self._may_move(
            residency, expert_map, newcomers, now
        ):
            return None
        plan = self._plan_under(revision)
        if plan is not None and plan.step is not None:
            return plan.step
        if plan is not None and self._planned_for == state.desired.rebalances:
            self._rebalances_done = state.desired.rebalances
            if not self._rebalancer.is_due(expert_map, now):
                return None
        self._planning_revision, self._planned_for = revision, state.desired.rebalances
        return self._request(residency, expert_map, revision, now)

    def _plan_under(self, revision: int) -> HealPlan | None:
        return self._planned[1] if self._planned and self._planned[0] == revision else None

    def _may_move(
        self, residency: Residency, expert_map: ExpertMap, newcomers: Sequence[Member], now: float
    ) -> bool:
        desired = residency.state.desired
        is_asked = desired.rebalances != self._rebalances_done or desired.restart is not None
        waited_s = (now - self._first_seen[m] for m in newcomers)
        return (
            (is_asked or now - self._quiet_since >= self._policy.after_s)
            and all(seconds > self._policy.joiner_timeout_s for seconds in waited_s)
            and all(residency.is_settled(m) for m in expert_map.members)
        )

    def _request(
        self, residency: Residency, expert_map: ExpertMap, revision: int, now: float
    ) -> PlanHeal:
        return PlanHeal(
            expert_map=expert_map,
            map_revision=revision,
            nodes=residency.nodes(expert_map.members),
            budget_bytes=self._policy.budget_bytes,
            bytes_per_expert=self._policy.bytes_per_expert,
            redundant=residency.spec.redundant_experts,
            survive=self._policy.survive,
            goal=self._rebalancer.goal(now),
        )


def _map_revision(state: ClusterState) -> int:
    return state.revision_of(state.keys.map)
