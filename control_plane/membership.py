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
    members hold something else than the map   | PublishMap of what they hold (a heal's second half)
    no change for a while                      | PlanHeal, then its step: PublishMap with the slots
                                               | emptied, together with the assignment
    keys of incarnations that are gone         | DeleteKeys

A published map names all experts, and only where they are resident, or as computed on demand. Its
transaction compares the map before it, and it leaves out only members with a verdict. A map that
removes nobody waits until all members run under the map before it: ranks that meet by counting CUDA
graph launches admit a joiner together, and a rank that missed a map does not know with whom its
peers count. A map after a death does not wait, and therefore lists the joiners that may not yet
have been admitted by all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from control_plane.cluster_state import ClusterState
from control_plane.formation import (
    AssignRows,
    Formation,
    FormationPolicy,
    PublishRows,
    TooFewSlots,
)
from control_plane.judgements import Alarm, AlarmKind
from control_plane.map_adoption import MapAdoption
from control_plane.placement import HealPlan
from control_plane.plans import plan_join, plan_shrink
from control_plane.rebalancer import RebalancePolicy, Rebalancer
from control_plane.residency import Residency
from control_plane.writes import (
    Assign,
    Decision,
    DeclareDead,
    DeleteKeys,
    PlanHeal,
    PublishMap,
    Write,
)
from shared.expert_map import ExpertMap, Placement
from shared.records import SlotContents, Verdict
from shared.types import Epoch, Member

_DELETED_KEYS_MAX = 64


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
    rebalance: RebalancePolicy = field(default_factory=RebalancePolicy)


class Membership:
    """Call `decide` after each change of the cluster state and at regular intervals, and perform
    its write before the next call."""

    def __init__(self, policy: MembershipPolicy) -> None:
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
        self._running_epoch = Epoch(0)  # the newest under which a member was seen to run
        self._first_seen: dict[Member, float] = {}
        self._quiet_since = 0.0
        self._quiet_state: object = None
        self._planning_revision = -1
        self._planned: tuple[int, HealPlan] | None = None
        self._alarms: list[Alarm] = []
        self._alarmed: set[AlarmKind] = set()

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

    def on_adopted(self, member: Member, epoch: Epoch) -> None:
        """A Pong says under which map a member runs."""
        self._running_epoch = max(self._running_epoch, epoch)
        self._adoption.on_adopted(member, epoch)

    def on_out_of_step(self, member: Member, epoch: Epoch) -> None:
        """A Pong says under which map a member has lost count of its peers' graphs; 0: it has
        not."""
        self._adoption.on_out_of_step(member, epoch)

    def on_standstill(self) -> None:
        """No step moves under the present map, though all members live."""
        self._adoption.on_standstill()

    def on_heal_planned(self, request: PlanHeal, plan: HealPlan, now: float) -> None:
        self._planning_revision = -1
        self._planned = (request.map_revision, plan)
        self.rebalancer.on_planned(request.goal, plan, now)

    def take_alarms(self) -> list[Alarm]:
        alarms, self._alarms = self._alarms, []
        return alarms + self.rebalancer.take_alarms()

    def decide(self, state: ClusterState, now: float, *, frozen: bool = False) -> Decision | None:
        """The next write that `state` calls for. If `frozen`, only deaths may change the map."""
        spec = state.spec
        if spec is None or not state.synced:
            return None
        self._note_time(state, now)
        residency = Residency(state, spec)
        expert_map = residency.expert_map
        members = expert_map.members if expert_map is not None else ()
        survivors = [m for m in members if m not in self._dead]
        if expert_map is None or not survivors:
            return (
                self._declare_dead(residency, members)
                or self._form(residency, [], now)
                or self._delete_stale_keys(state, members)
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
        return (
            self._admit(residency, expert_map, now)
            or self._publish_loaded(residency, expert_map, now)
            or self._heal(residency, expert_map, now)
            or self._delete_stale_keys(state, members)
        )

    # Forming.

    def _form(self, residency: Residency, survivors: Sequence[Member], now: float) -> Write | None:
        newcomers = self._newcomers(residency, survivors)
        step = self._formation.next_step(residency, survivors, newcomers, now)
        match step:
            case TooFewSlots():
                self._alarm_slots(step)
            case AssignRows():
                self._alarmed.discard(AlarmKind.TOO_FEW_SLOTS)
                return self._assign(residency, step.by_member, force=True)
            case PublishRows():
                num_ranks = residency.spec.num_ranks
                cause = f"formed by {len(step.by_member)} of {num_ranks} ranks"
                return self._publish(residency, step.by_member, cause, now)
        return None

    # Deaths.

    def _remove_dead(
        self, residency: Residency, expert_map: ExpertMap, survivors: Sequence[Member], now: float
    ) -> Write | None:
        rows = residency.available_rows(survivors)
        dead = [m for m in expert_map.members if m in self._dead]
        if residency.covers(rows):
            names = ", ".join(f"{m} ({self._dead[m].cause.value})" for m in dead)
            return self._publish(residency, rows, f"dead: {names}", now)
        unproven = self._adoption.unproven
        loads = self.rebalancer.loads
        result = plan_shrink(residency, expert_map, survivors, dead, unproven, loads)
        if result.uncoverable and residency.can_compute_on_demand(survivors):
            names = ", ".join(f"{m} ({self._dead[m].cause.value})" for m in dead)
            return self._publish(residency, rows, f"dead: {names}; below capacity", now)
        if result.uncoverable:
            return self._declare_dead(residency, dead) or self._form(residency, survivors, now)
        wanted = {m: result.refilled[:, m.rank] for m in survivors}
        return self._assign(residency, wanted, dead=dead) or self._declare_dead(residency, dead)

    def _declare_dead(self, residency: Residency, members: Sequence[Member]) -> DeclareDead | None:
        verdicts = self._fresh_verdicts(residency.state, members)
        return DeclareDead(verdicts=verdicts) if verdicts else None

    def _fresh_verdicts(
        self, state: ClusterState, members: Iterable[Member]
    ) -> tuple[Verdict, ...]:
        """For the dead among `members` that have no verdict in etcd yet."""
        fresh = [m for m in members if m in self._dead and m not in state.verdicts]
        epoch = self._next_epoch(state)
        return tuple(replace(self._dead[m], epoch=epoch) for m in fresh)

    # The same placement again.

    def _republish(
        self, residency: Residency, expert_map: ExpertMap, cause: str, now: float
    ) -> Write | None:
        """In a resync every member is a joiner: counts of graphs begin together."""
        rows = {m: expert_map.placement[:, m.rank] for m in expert_map.members}
        return self._publish(residency, rows, cause, now, at_once=True)

    # Joiners.

    def _admit(self, residency: Residency, expert_map: ExpertMap, now: float) -> Write | None:
        members = expert_map.members
        newcomers = self._newcomers(residency, members)
        unassigned = [m for m in newcomers if residency.assigned(m) is None]
        if unassigned:
            known = [m for m in newcomers if m not in unassigned]
            loads = self.rebalancer.loads
            result = plan_join(residency, expert_map, [*members, *known], unassigned, loads)
            wanted = {m: result.placement[:, m.rank] for m in unassigned}
            return self._assign(residency, wanted, force=True)
        admitted: list[Member] = []
        for newcomer in newcomers:
            together = [*members, *admitted, newcomer]
            if residency.is_ready(newcomer) and residency.are_linked(together):
                admitted.append(newcomer)
        if not admitted:
            return None
        rows = residency.available_rows([*members, *admitted])
        cause = "joined: " + ", ".join(str(m) for m in admitted)
        return self._publish(residency, rows, cause, now) if residency.serves(rows) else None

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
        return self._publish(residency, rows, cause, now)

    def _heal(self, residency: Residency, expert_map: ExpertMap, now: float) -> Decision | None:
        revision = _map_revision(residency.state)
        if not self._is_quiet(residency, expert_map, now) or self._planning_revision == revision:
            return None
        if self._planned is None or self._planned[0] != revision:
            return self._plan_heal(residency, expert_map, revision, now)
        step = self._planned[1].step
        if step is None:
            is_due = self.rebalancer.is_due(expert_map, now)
            return self._plan_heal(residency, expert_map, revision, now) if is_due else None
        wanted = {m: step.placement[:, m.rank] for m in expert_map.members}
        if np.array_equal(step.emptied, expert_map.placement):
            return self._assign(residency, wanted)
        emptied = {m: step.emptied[:, m.rank] for m in expert_map.members}
        assignments = residency.assignments(wanted, epoch=expert_map.epoch + 1)
        return self._publish(residency, emptied, f"healing: {step.reason}", now, assignments)

    def _plan_heal(
        self, residency: Residency, expert_map: ExpertMap, revision: int, now: float
    ) -> PlanHeal:
        self._planning_revision = revision
        return PlanHeal(
            expert_map=expert_map,
            map_revision=revision,
            nodes=residency.nodes(expert_map.members),
            budget_bytes=self._policy.heal_budget_bytes,
            bytes_per_expert=self._policy.bytes_per_expert,
            redundant=residency.spec.redundant_experts,
            survive=self._policy.survive,
            goal=self.rebalancer.goal(now),
        )

    def _is_quiet(self, residency: Residency, expert_map: ExpertMap, now: float) -> bool:
        waiting = (
            now - self._first_seen[m] for m in self._newcomers(residency, expert_map.members)
        )
        return (
            now - self._quiet_since >= self._policy.heal_after_s
            and all(waited_s > self._policy.joiner_timeout_s for waited_s in waiting)
            and all(residency.is_settled(m) for m in expert_map.members)
        )

    def _delete_stale_keys(self, state: ClusterState, members: Iterable[Member]) -> Write | None:
        current_members = {*members, *state.records}
        gone = (
            state.keys.assignment(m.rank, m.incarnation)
            for m in state.assignments
            if m not in current_members
        )
        stale_suspicions = (
            k for k, s in state.suspicions.items() if s.member not in current_members
        )
        keys = tuple(itertools.islice(itertools.chain(gone, stale_suspicions), _DELETED_KEYS_MAX))
        return DeleteKeys(keys=keys) if keys else None

    # Writes.

    def _publish(
        self,
        residency: Residency,
        rows: dict[Member, Placement],
        cause: str,
        now: float,
        assignments: tuple[SlotContents, ...] = (),
        *,
        at_once: bool = False,
    ) -> PublishMap | None:
        current, epoch = residency.state.expert_map, self._next_epoch(residency.state)
        leavers = [m for m in (current.members if current else ()) if m not in rows]
        if any(m not in self._dead for m in leavers):  # a map of an older spec: judge it first
            return None
        if not leavers and not at_once and not self._adoption.may_follow(now):
            return None
        expert_map = residency.map_of(
            rows,
            epoch=epoch,
            joiners=self._adoption.joiners(rows),
            cause=cause,
            published_at=now,
        )
        self._alarm_on_demand(expert_map)
        return PublishMap(
            expert_map=expert_map,
            verdicts=tuple(replace(self._dead[m], epoch=epoch) for m in leavers),
            assignments=assignments,
        )

    def _assign(
        self,
        residency: Residency,
        wanted: dict[Member, Placement],
        *,
        force: bool = False,
        dead: Iterable[Member] = (),
    ) -> Write | None:
        epoch = self._next_epoch(residency.state) - 1
        assignments = residency.assignments(wanted, epoch=epoch, force=force)
        verdicts = self._fresh_verdicts(residency.state, dead)
        return Assign(assignments=assignments, verdicts=verdicts) if assignments else None

    def _next_epoch(self, state: ClusterState) -> Epoch:
        """Above that of every map that somebody may run, also if etcd has lost it."""
        current = state.expert_map
        known = current.epoch if current is not None else Epoch(0)
        return Epoch(max(known, self._running_epoch) + 1)

    def _note_time(self, state: ClusterState, now: float) -> None:
        for member in state.records:
            self._first_seen.setdefault(member, now)
        quiet_state = (_map_revision(state), frozenset(state.records))
        if quiet_state != self._quiet_state:
            self._quiet_state, self._quiet_since = quiet_state, now
        expert_map = state.expert_map
        kept = {*state.records, *(expert_map.members if expert_map else ())}
        self._first_seen = {m: t for m, t in self._first_seen.items() if m in kept}
        self._dead = {m: d for m, d in self._dead.items() if m in kept}
        self._adoption.on_map(expert_map, kept, now)
        if state.spec is not None:
            self.rebalancer.on_state(state.spec, _map_revision(state), frozenset(kept), now)

    def _newcomers(self, residency: Residency, members: Iterable[Member]) -> list[Member]:
        return [m for m in residency.newcomers(members) if m not in self._dead]

    def _alarm_on_demand(self, expert_map: ExpertMap) -> None:
        num_experts = int((expert_map.on_demand >= 0).sum())
        if not num_experts:
            self._alarmed.discard(AlarmKind.BELOW_CAPACITY)
        elif AlarmKind.BELOW_CAPACITY not in self._alarmed:
            self._alarmed.add(AlarmKind.BELOW_CAPACITY)
            detail = f"{num_experts} experts have no slot; their weights are read for every step"
            self._alarms.append(Alarm(kind=AlarmKind.BELOW_CAPACITY, detail=detail))

    def _alarm_slots(self, step: TooFewSlots) -> None:
        if AlarmKind.TOO_FEW_SLOTS not in self._alarmed:
            self._alarmed.add(AlarmKind.TOO_FEW_SLOTS)
            detail = (
                f"{step.num_ranks} ranks have too few slots: {step.num_unplaced} experts find no "
                "place; serving waits for more ranks"
            )
            self._alarms.append(Alarm(kind=AlarmKind.TOO_FEW_SLOTS, detail=detail))


def _map_revision(state: ClusterState) -> int:
    return state.revision_of(state.keys.map)
