"""What must hold at every moment of every schedule, beside what clients see: no verdict ends a life
that runs and can be reached, loading converges, and graphs meet only graphs of their own number.
Violations are collected; the cluster raises the first one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from control_plane.writes import PublishMap
from shared.desired_state import AfterDrain, DesiredState
from shared.expert_map import Placement
from shared.records import SlotContents, Verdict, unpack_map, unpack_record
from shared.store import WatchEvent
from shared.types import EMPTY_SLOT, Member, SuspicionReason
from shared.wire import StatusQuery
from tests.sim.cluster import SimCluster
from tests.sim.sim_loop import SimProcess

PAUSE_S = 1.0
"""A life that stands still for no longer than this must survive."""
AFTER_CUT_S = 2.0
"""So long after the end of a cut or a stop its verdict may still come."""
AFTER_DRAIN_S = 1.0
"""So long after a drain was asked for a map may be written that did not know of it."""
MAPS_PER_INCARNATION = 14
"""The map without its predecessor, the one that takes it in, and after each of them three heals of
two maps."""
MAPS_PER_LOAD = 8
"""What a load that experts have not had before may cost: two rebalances of two steps."""


class SlotTargets:
    """What maps and assignments have wanted in the slots of one incarnation, and what was loaded.
    An expert may be loaded into a slot as often as it has become the slot's target."""

    def __init__(self) -> None:
        self._target: dict[tuple[int, int], int] = {}
        self._allowed: Counter[tuple[int, int, int]] = Counter()

    def want(self, wanted_LS: Placement) -> None:
        for layer, slot in np.ndindex(wanted_LS.shape):
            expert = max(int(wanted_LS[layer, slot]), EMPTY_SLOT)
            if self._target.get((layer, slot)) != expert:
                self._target[layer, slot] = expert
                self._allowed[layer, slot, expert] += 1

    def load(self, wanted_LS: Placement, contents_LS: Placement) -> str | None:
        """Says what is wrong with it, if anything."""
        for layer, slot in np.argwhere((wanted_LS >= 0) & (wanted_LS != contents_LS)).tolist():
            expert = int(wanted_LS[layer, slot])
            self._allowed[layer, slot, expert] -= 1
            if self._allowed[layer, slot, expert] < 0:
                return f"expert {expert} of layer {layer} again into slot {slot}"
        return None


@dataclass
class InvariantChecker:
    """Hooks into etcd: it sees verdicts, maps and assignments at the moment of their writing."""

    cluster: SimCluster
    num_maps: int = 0
    targets: dict[Member, SlotTargets] = field(default_factory=dict)
    declared_dead: set[Member] = field(default_factory=set)
    _members: set[Member] = field(default_factory=set)
    causes: list[SuspicionReason] = field(default_factory=list)  # of the verdicts

    def __post_init__(self) -> None:
        cluster = self.cluster
        publish = cluster.etcd._publish

        def seen(event: WatchEvent) -> None:
            if event.value is not None:
                self._on_put(event.key, event.value)
            publish(event)

        cluster.etcd._publish = seen  # type: ignore[method-assign]
        cluster.on_load = self._on_load
        cluster.on_offer = self._on_offer
        cluster.on_exit = self._on_exit

    def _on_put(self, key: str, value: bytes) -> None:
        keys = self.cluster.keys
        if key.startswith(keys.verdicts):
            self._check_verdict(unpack_record(value, Verdict))
        elif key.startswith(keys.assignments):
            contents = unpack_record(value, SlotContents)
            member = Member(rank=contents.rank, incarnation=contents.incarnation)
            self._targets_of(member).want(contents.array())
        elif key == keys.map:
            self.num_maps += 1
            expert_map = unpack_map(value)
            self._check_joiners(set(expert_map.members))
            for member in expert_map.members:
                self._targets_of(member).want(expert_map.placement[:, member.rank])
            bound = MAPS_PER_INCARNATION * len(self.cluster.processes)
            if self.cluster.loads is not None:
                bound += MAPS_PER_LOAD * self.cluster.loads.num_changes
            if self.num_maps > bound:
                self._violate(f"{self.num_maps} maps for {len(self.cluster.processes)} lives")

    def _on_offer(self, offered: PublishMap) -> None:
        """A map that ranks get without etcd ends the lives of those that it leaves out. etcd has
        their verdicts later, perhaps from a leader that knows no more than that."""
        for verdict in offered.verdicts:
            self._check_verdict(verdict)

    def _check_verdict(self, verdict: Verdict) -> None:
        """Invariant 11 asks of a verdict when it ends the life, which is when it is first written:
        from then on the life is fenced (6). The map that leaves it out may have to wait for orphans
        for seconds, and writes the verdict once more, with its epoch: that ends nothing, and what
        was cut or stopped may by then be whole again."""
        member = verdict.member
        if member in self.declared_dead:
            return
        self.declared_dead.add(member)
        self.causes.append(verdict.cause)
        if verdict.cause is SuspicionReason.DRAINED:
            if self._desired().drain_of(member.rank) is None:
                self._violate(f"{member} was drained, and nobody has asked for it")
            return
        if not verdict.signals:
            self._violate(f"a verdict on {member} does not say upon what it rests")
        process = self.cluster.processes.get(member)
        if process is None or self._may_be_declared_dead(process):
            return
        signals = ", ".join(f"{s.reason.value} by {s.by} ({s.detail})" for s in verdict.signals)
        waited_ms = (verdict.decided_at - verdict.first_signal_at) * 1000
        self._violate(
            f"a verdict ended {member}, which lives: {verdict.cause.value} after "
            f"{waited_ms:.0f} ms; {signals}"
        )

    def _check_joiners(self, members: set[Member]) -> None:
        """Nobody joins who was drained before the map can have been decided."""
        drained = {
            drain.rank
            for drain in self._desired().drains
            if drain.after is AfterDrain.STAY
            and self.cluster.clock.wall() - drain.requested_at > AFTER_DRAIN_S
        }
        for member in members - self._members:
            if member.rank in drained:
                self._violate(f"{member} joins, though it is drained")
        self._members = members

    def _desired(self) -> DesiredState:
        found = self.cluster.etcd.values.get(self.cluster.keys.desired)
        return DesiredState() if found is None else unpack_record(found.value, DesiredState)

    def _may_be_declared_dead(self, process: SimProcess) -> bool:
        now = self.cluster.clock.now()
        stalled_s = now - process.stalled_since if process.num_stalls else 0.0
        cut_until = self.cluster.network.cut_until.get(process.host, -AFTER_CUT_S)
        return (
            process.dead
            or process.exit_code is not None
            or process.device_failed
            or process.stopped
            or now - process.stopped_until < AFTER_CUT_S
            or max(stalled_s, process.longest_stall_s) > PAUSE_S
            or now - cut_until < AFTER_CUT_S
        )

    def _on_exit(self, member: Member) -> None:
        """By itself: a verdict or a map without it must have told it to, unless it has taken part
        in no step, or was told to end and serves alone or has waited for its drain long enough."""
        etcd, keys = self.cluster.etcd, self.cluster.keys
        if keys.verdict(member.rank, member.incarnation) in etcd.values:
            return
        found = etcd.values.get(keys.map)
        expert_map = unpack_map(found.value) if found is not None else None
        if expert_map is None or not expert_map.has(member):
            return
        waits_until = self.cluster.told_to_leave.get(self.cluster.processes[member])
        is_alone = expert_map.members == (member,)
        if waits_until is not None and (is_alone or self.cluster.clock.now() >= waits_until):
            return
        if self.cluster.ranks[member]._rank._engine.status(StatusQuery(nonce=0)).steps_committed:
            self._violate(f"{member}, a member, left though nobody had declared it dead")

    def _on_load(self, member: Member, wanted: Placement, contents: Placement) -> None:
        if (wrong := self._targets_of(member).load(wanted, contents)) is not None:
            self._violate(f"{member} loads {wrong}, though nothing has asked for it anew")

    def _targets_of(self, member: Member) -> SlotTargets:
        return self.targets.setdefault(member, SlotTargets())

    def _violate(self, text: str) -> None:
        self.cluster.violations.append(text)
