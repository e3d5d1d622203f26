"""Decides which map, and which loads, the instance needs next. Pure: the cluster state and the
detector's verdicts in, at most one write out.

Theory of operation. Every decision is made from the cluster state alone. Only verdicts that are not
yet published, and times, are remembered, so that a new leader continues where the old one stopped.
The first line that applies decides; each write changes the state, and the next decision follows
from that.

    the state shows                            | the write
    -------------------------------------------+-----------------------------------------------
    no map, or none of its members alive       | DeclareDead the dead; then forming (`formation`):
                                               | Assign to registered ranks, PublishMap when they
                                               | have loaded their assignments and are linked
    a dead member, the rest hold all experts   | PublishMap without it, with the verdict
    a dead member, orphans                     | Assign the orphans to spare or surplus slots of
                                               | survivors (joiners that have not stepped yet
                                               | come last), with the verdict; the line above
                                               | applies once they are resident
    a dead member, too few slots for orphans   | PublishMap without it, in which experts without
                                               | a slot are on demand; where a survivor cannot do
                                               | that, DeclareDead it; then forming, with
                                               | survivors and joiners together
    etcd has lost the map that ranks run       | PublishMap of the same
    a member has lost count, or a standstill   | PublishMap of the same, all of them joiners
    a newcomer without assignment              | Assign what `grow` wants
    a newcomer that is ready and linked        | PublishMap with it
    drained members, the rest hold all experts | PublishMap without them, with verdicts that say so
    drained members, the rest lack experts     | PublishMap with slots emptied for these, together
                                               | with the assignment; or only Assign
    members hold something else than the map   | PublishMap of what they hold (a heal's second half)
    no change for a while                      | PlanHeal, then its step: PublishMap with the slots
                                               | emptied, together with the assignment
    a part of a change on purpose is done      | PublishDesired (`planned_change`)
    keys of incarnations that are gone         | DeleteKeys

A published map names all experts, and only where they are resident, or as computed on demand. Its
transaction compares the map before it, and it leaves out only members with a verdict. A map that
removes nobody waits until all members run under the map before it: ranks that meet by counting CUDA
graph launches admit a joiner together, and a rank that missed a map does not know with whom its
peers count. A map after a death does not wait, and therefore lists the joiners that may not yet
have been admitted by all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from control_plane.capacity_alarms import CapacityAlarms
from control_plane.cluster_state import ClusterState
from control_plane.formation import (
    AssignRows,
    Formation,
    FormationPolicy,
    PublishRows,
    TooFewSlots,
)
from control_plane.healing import Healing, HealPolicy, RebalanceProgress
from control_plane.judgements import Alarm
from control_plane.map_adoption import MapAdoption
from control_plane.placement import HealPlan
from control_plane.planned_change import DrainPolicy, PlannedChange
from control_plane.plans import emptied_for, plan_join, plan_leave, plan_shrink
from control_plane.rebalancer import RebalancePolicy, Rebalancer
from control_plane.residency import Residency
from control_plane.stale_keys import delete_stale_keys
from control_plane.write_builder import WriteBuilder
from control_plane.writes import Assign, Decision, PlanHeal, Write
from shared.expert_map import ExpertMap, Placement
from shared.records import Verdict
from shared.types import Epoch, Member
from shared.wire import Pong

_NO_EPOCH = Epoch(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipPolicy:
    bytes_per_expert: int
    survive: int = 1  # rank failures to survive without a reload, whatever it costs in balance
    formation_grace_s: float = 1.0  # see FormationPolicy, for this and the next two
    first_formation_grace_s: float = 5.0
    formation_window_s: float = 30.0
    heal_after_s: float = 5.0  # time without a change before experts are moved
    joiner_timeout_s: float = 30.0  # a newcomer delays heals for this long at most
    heal_budget_bytes: int = 256 << 20  # weights moved by one step
    adoption_timeout_s: float = 10.0  # a member under an old map delays the next for this long
    drains: DrainPolicy = DrainPolicy()
    rebalance: RebalancePolicy = field(default_factory=RebalancePolicy)


class Membership:
    """Call `decide` after each change of the cluster state and at regular intervals, and perform
    its write before the next call."""

    def __init__(self, policy: MembershipPolicy, *, first_epoch: Epoch = _NO_EPOCH) -> None:
        """No map gets a lower epoch than `first_epoch`."""
        self._policy = policy
        self._adoption = MapAdoption(policy.adoption_timeout_s)
        self.rebalancer = Rebalancer(policy.rebalance)
        self._formation = Formation(
            FormationPolicy(
                grace_s=policy.formation_grace_s,
                first_grace_s=policy.first_formation_grace_s,
                window_s=policy.formation_window_s,
                survive=policy.survive,
            )
        )
        self._dead: dict[Member, Verdict] = {}
        self._writes = WriteBuilder(self._adoption, self._dead, first_epoch)
        self._healing = Healing(
            HealPolicy(
                bytes_per_expert=policy.bytes_per_expert,
                survive=policy.survive,
                after_s=policy.heal_after_s,
                joiner_timeout_s=policy.joiner_timeout_s,
                budget_bytes=policy.heal_budget_bytes,
            ),
            self.rebalancer,
        )
        self._planned_change = PlannedChange(policy.drains)
        self._capacity_alarms = CapacityAlarms()

    @property
    def dead(self) -> frozenset[Member]:
        return frozenset(self._dead)

    def dead_in_map(self, state: ClusterState) -> tuple[Member, ...]:
        """Dead members that the map still names. While there are any, no step completes."""
        expert_map = state.expert_map
        return tuple(m for m in self._dead if expert_map is not None and expert_map.has(m))

    def on_dead(self, verdict: Verdict) -> None:
        """A new verdict of the failure detector."""
        self._dead[verdict.member] = verdict

    def withdraw(self, member: Member) -> None:
        """A verdict of ours on it, which was not written, does not stand any more."""
        self._dead.pop(member, None)

    def on_verdict(self, verdict: Verdict) -> None:
        """A verdict that etcd holds, perhaps of an earlier leader."""
        self._dead.setdefault(verdict.member, verdict)

    def on_pong(self, member: Member, pong: Pong, now: float) -> None:
        """It says under which map a member runs, and whether it has lost count of its peers'
        graphs; how many sessions it has, and how long the others wait for it."""
        self._writes.on_running(pong.epoch)
        self._adoption.on_adopted(member, pong.epoch)
        self._adoption.on_out_of_step(member, pong.out_of_step)
        self._planned_change.on_pong(member, pong, now)

    def on_publishing(self, epoch: Epoch) -> None:
        """A map of this epoch may come to be in etcd: no other one gets it."""
        self._writes.on_publishing(epoch)

    def on_standstill(self) -> None:
        """No step moves under the present map, though all members live."""
        self._adoption.on_standstill()

    def on_heal_planned(self, request: PlanHeal, plan: HealPlan, now: float) -> None:
        self._healing.on_planned(request, plan, now)

    @property
    def rebalance(self) -> RebalanceProgress:
        return self._healing.rebalance

    def take_alarms(self) -> list[Alarm]:
        return self._capacity_alarms.take() + self.rebalancer.take_alarms()

    def decide(
        self, state: ClusterState, now: float, *, unix_now: float = 0.0, frozen: bool = False
    ) -> Decision | None:
        """The next write that `state` calls for. If `frozen`, only deaths may change the map.
        `unix_now` is the same moment in Unix seconds."""
        spec = state.spec
        if spec is None or not state.synced:
            return None
        self._note_time(state, now)
        residency = Residency(state, spec)
        decision = self._next_write(state, residency, now, unix_now=unix_now, frozen=frozen)
        expert_map = residency.expert_map
        if (
            expert_map is None
            or not isinstance(decision, Assign)
            or self._writes.is_newest_map_stored(state)
        ):
            return decision
        # Ranks wait for the map that an assignment refers to.
        return self._republish(residency, expert_map, "published again: etcd lacks it", now)

    def _next_write(
        self,
        state: ClusterState,
        residency: Residency,
        now: float,
        *,
        unix_now: float,
        frozen: bool,
    ) -> Decision | None:
        expert_map = residency.expert_map
        members = expert_map.members if expert_map is not None else ()
        survivors = [m for m in members if m not in self._dead]
        if expert_map is None or not survivors:
            return (
                self._writes.declare_dead(residency, members)
                or self._form(residency, [], now)
                or self._planned_change.next_desired(state, unix_now, is_whole=False)
                or delete_stale_keys(state, members)
            )
        if len(survivors) < len(members):
            return self._remove_dead(residency, expert_map, survivors, now)
        self._formation.end()
        if not state.is_map_stored:
            return self._republish(residency, expert_map, "published again: etcd lost it", now)
        if self._adoption.needs_resync(members):
            return self._republish(residency, expert_map, "resync: counts begin together", now)
        if frozen:
            return None
        left_out = [m for m in state.records if m in self._dead and not expert_map.has(m)]
        if declared := self._writes.declare_dead(residency, left_out):
            return declared  # by maps that ranks were given while etcd was away
        newcomers = self._newcomers(residency, members)
        leavers = self._planned_change.leavers(state, members, now)
        return (
            self._admit(residency, expert_map, newcomers, now)
            or self._remove_drained(residency, expert_map, leavers, now)
            or self._publish_loaded(residency, expert_map, now)
            or (None if leavers else self._heal(residency, expert_map, newcomers, now))
            or self._planned_change.next_desired(
                state,
                unix_now,
                is_whole=not leavers
                and state.desired.restart is not None
                and self._is_whole(residency, expert_map, newcomers),
            )
            or delete_stale_keys(state, members)
        )

    # Forming.

    def _form(self, residency: Residency, survivors: Sequence[Member], now: float) -> Write | None:
        newcomers = self._newcomers(residency, survivors)
        step = self._formation.next_step(residency, survivors, newcomers, now)
        match step:
            case TooFewSlots():
                self._capacity_alarms.on_too_few_slots(step)
            case AssignRows():
                self._capacity_alarms.on_enough_slots()
                return self._writes.assign(residency, step.by_member, force=True)
            case PublishRows():
                cause = f"formed by {len(step.by_member)} of {residency.num_awaited} ranks"
                return self._writes.publish(residency, step.by_member, cause, now)
        return None

    # Deaths.

    def _remove_dead(
        self, residency: Residency, expert_map: ExpertMap, survivors: Sequence[Member], now: float
    ) -> Write | None:
        rows = residency.available_rows(survivors)
        dead = [m for m in expert_map.members if m in self._dead]
        cause = "dead: " + ", ".join(f"{m} ({self._dead[m].cause.value})" for m in dead)
        if residency.covers(rows):
            return self._writes.publish(residency, rows, cause, now)
        unproven, loads = self._adoption.unproven, self.rebalancer.loads
        result = plan_shrink(residency, expert_map, survivors, dead, unproven, loads)
        if result.uncoverable and residency.can_compute_on_demand(survivors):
            return self._writes.publish(residency, rows, f"{cause}; below capacity", now)
        if result.uncoverable:
            return self._writes.declare_dead(residency, dead) or self._form(
                residency, survivors, now
            )
        wanted = {m: result.refilled[:, m.rank] for m in survivors}
        return self._writes.assign(residency, wanted, dead=dead) or self._writes.declare_dead(
            residency, dead
        )

    # The same placement again.

    def _republish(
        self, residency: Residency, expert_map: ExpertMap, cause: str, now: float
    ) -> Write | None:
        """In a resync every member is a joiner: counts of graphs begin together."""
        rows = {m: expert_map.placement[:, m.rank] for m in expert_map.members}
        return self._writes.publish(residency, rows, cause, now, at_once=True)

    # Joiners.

    def _admit(
        self, residency: Residency, expert_map: ExpertMap, newcomers: Sequence[Member], now: float
    ) -> Write | None:
        members = expert_map.members
        unassigned = [m for m in newcomers if residency.assigned(m) is None]
        if unassigned:
            known = [m for m in newcomers if m not in unassigned]
            loads = self.rebalancer.loads
            result = plan_join(residency, expert_map, [*members, *known], unassigned, loads)
            wanted = {m: result.placement[:, m.rank] for m in unassigned}
            return self._writes.assign(residency, wanted, force=True)
        admitted: list[Member] = []
        for newcomer in newcomers:
            together = [*members, *admitted, newcomer]
            if residency.is_ready(newcomer) and residency.are_linked(together):
                admitted.append(newcomer)
        if not admitted:
            return None
        rows = residency.available_rows([*members, *admitted])
        cause = "joined: " + ", ".join(str(m) for m in admitted)
        return self._writes.publish(residency, rows, cause, now) if residency.serves(rows) else None

    # Drained members.

    def _remove_drained(
        self, residency: Residency, expert_map: ExpertMap, leavers: Sequence[Member], now: float
    ) -> Write | None:
        """As many of them at once as the others can replace. What the others lack is loaded first,
        while all still serve."""
        if not self._adoption.may_follow(now):
            return None
        for num_leaving in range(len(leavers), 0, -1):
            leaving = leavers[:num_leaving]
            rest = [m for m in expert_map.members if m not in leaving]
            rows = residency.available_rows(rest)
            names = ", ".join(str(m) for m in leaving)
            if residency.covers(rows):
                cause = f"drained: {names}"
                return self._writes.publish(residency, rows, cause, now, drained=leaving)
            if residency.covers(residency.intended_rows(rest)):
                return None  # it is being loaded
            unproven, loads = self._adoption.unproven, self.rebalancer.loads
            wanted = plan_leave(residency, expert_map, rest, leaving, unproven, loads)
            if wanted is not None:
                return self._move(residency, expert_map, wanted, f"replacing: {names}", now)
        return None

    def _is_whole(
        self, residency: Residency, expert_map: ExpertMap, newcomers: Sequence[Member]
    ) -> bool:
        """All ranks that are wanted serve, and nothing is left to be moved."""
        return (
            not newcomers
            and len(expert_map.members) == residency.num_awaited
            and self._adoption.is_complete
            and all(residency.is_settled(m) for m in expert_map.members)
            and self._healing.nothing_to_move(residency.state)
        )

    # Heals.

    def _publish_loaded(
        self, residency: Residency, expert_map: ExpertMap, now: float
    ) -> Write | None:
        rows = residency.available_rows(expert_map.members)
        if not all(residency.is_settled(m) for m in expert_map.members):
            return None
        changed = residency.placement(rows) != expert_map.placement
        held = [m for m in expert_map.members if changed[:, m.rank].any()]
        if not held or not residency.serves(rows):
            return None
        cause = "healed: " + ", ".join(str(m) for m in held)
        return self._writes.publish(residency, rows, cause, now)

    def _heal(
        self, residency: Residency, expert_map: ExpertMap, newcomers: Sequence[Member], now: float
    ) -> Decision | None:
        step = self._healing.next_step(residency, expert_map, newcomers, now)
        if step is None or isinstance(step, PlanHeal):
            return step
        rows = {m: step.placement[:, m.rank] for m in expert_map.members}
        return self._move(residency, expert_map, rows, f"healing: {step.reason}", now)

    def _move(
        self,
        residency: Residency,
        expert_map: ExpertMap,
        wanted: dict[Member, Placement],
        cause: str,
        now: float,
    ) -> Write | None:
        """Nobody uses a slot while it is loaded: a map that leaves those slots empty comes first,
        with the assignments, unless they are empty already."""
        emptied = emptied_for(residency, expert_map, wanted)
        if np.array_equal(residency.placement(emptied), expert_map.placement):
            return self._writes.assign(residency, wanted)
        epoch = self._writes.next_epoch(residency.state)
        assignments = residency.assignments(wanted, epoch=epoch)
        return self._writes.publish(residency, emptied, cause, now, assignments)

    # What is known.

    def _note_time(self, state: ClusterState, now: float) -> None:
        self._healing.note(state, now)
        expert_map = state.expert_map
        kept = {*state.records, *(expert_map.members if expert_map else ())}
        for member in [m for m in self._dead if m not in kept]:
            del self._dead[member]
        self._adoption.on_map(expert_map, kept, now)
        self._capacity_alarms.on_map(expert_map)

    def _newcomers(self, residency: Residency, members: Iterable[Member]) -> list[Member]:
        return [m for m in residency.newcomers(members) if m not in self._dead]
