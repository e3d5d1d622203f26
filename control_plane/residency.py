"""What the slots of the instance's ranks are meant to hold, and what they surely hold, computed
from a ClusterState. It decides nothing.

*Intended* is the assignment, or the map's row if there is none yet. *Available* is what is both
intended and resident. A slot that is being loaded holds neither its old expert nor its new one, and
counts as empty. So does one that the rank may be loading for an earlier assignment (`disputed`),
until it says that it knows the present one: a map that named such a slot would have tokens sent to
an expert that is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from control_plane.cluster_state import ClusterState
from shared.desired_state import AfterDrain
from shared.errors import WireError
from shared.expert_map import ExpertMap, Placement
from shared.records import InstanceSpec, SlotContents
from shared.types import ABSENT_SLOT, EMPTY_SLOT, Epoch, Member, NodeId, RankId, RankState

_UNKNOWN_NODE = NodeId("?")


class Residency:
    """Rows are `[num_layers, slots_per_rank]` int16."""

    def __init__(self, state: ClusterState, spec: InstanceSpec) -> None:
        self.state = state
        self.spec = spec
        self._shape = (spec.num_moe_layers, spec.slots_per_rank)
        self._desired_ranks = frozenset(state.desired.rank_ids(spec.num_ranks))
        self.num_ranks = _num_rows(state, spec, self._desired_ranks)
        self.expert_map = self._map_of_spec()

    def _map_of_spec(self) -> ExpertMap | None:
        """The present map with a row for each rank that may come, or None if its sizes are not
        those of the spec."""
        expert_map = self.state.expert_map
        if expert_map is None or expert_map.num_experts != self.spec.num_experts:
            return None
        if expert_map.placement.shape[::2] != self._shape:
            return None
        if expert_map.num_ranks == self.num_ranks:
            return expert_map
        rows = {m: expert_map.placement[:, m.rank] for m in expert_map.members}
        on_demand = _with_rows(expert_map.on_demand, expert_map.members, self.num_ranks)
        return replace(expert_map, placement=self.placement(rows), on_demand=on_demand)

    def widen(self, row: Placement) -> Placement:
        """`row` with ABSENT_SLOT appended up to the spec's slots per rank."""
        result = np.full(self._shape, ABSENT_SLOT, dtype=np.int16)
        result[:, : row.shape[1]] = row
        return result

    def assigned(self, member: Member) -> Placement | None:
        return self._row(self.state.assignments.get(member))

    def resident(self, member: Member) -> Placement | None:
        return self._row(self.state.residents.get(member))

    def intended(self, member: Member) -> Placement:
        row = self.assigned(member)
        if row is not None:
            return row
        expert_map = self.expert_map
        if expert_map is not None and expert_map.has(member):
            return expert_map.placement[:, member.rank]
        slots = self.slots([member])[member.rank]
        return self.widen(np.full((self._shape[0], slots), EMPTY_SLOT, dtype=np.int16))

    def available(self, member: Member) -> Placement:
        intended, resident = self.intended(member), self.resident(member)
        expert_map = self.expert_map
        if resident is None and expert_map is not None and expert_map.has(member):
            # The key was deleted with its expired lease; the weights are still there.
            resident = expert_map.placement[:, member.rank]
        if resident is None:
            return np.minimum(intended, EMPTY_SLOT)
        lacking = (intended != resident) | self._disputed(member)
        return np.where((intended >= 0) & lacking, EMPTY_SLOT, intended)

    def is_settled(self, member: Member) -> bool:
        """Whether it holds all that it was assigned."""
        return bool(np.array_equal(self.available(member), self.intended(member)))

    def is_ready(self, member: Member) -> bool:
        """Whether a joiner has loaded its assignment, and its record says READY."""
        record = self.state.records.get(member)
        return (
            record is not None
            and record.state is RankState.READY
            and self.assigned(member) is not None
            and self.is_settled(member)
        )

    def are_linked(self, members: Sequence[Member]) -> bool:
        """Whether each has an open link to every other, according to their records."""
        links = {m: frozenset(self._links(m)) for m in members}
        return all(b in links[a] for a in members for b in members if a != b)

    def placement(self, rows: dict[Member, Placement]) -> Placement:
        """`[num_layers, num_ranks, slots_per_rank]`; ranks without a row are empty."""
        layers, width = self._shape
        result = np.full((layers, self.num_ranks, width), EMPTY_SLOT, dtype=np.int16)
        for member, row in rows.items():
            result[:, member.rank] = row
        return result

    def map_of(
        self,
        rows: dict[Member, Placement],
        *,
        epoch: int,
        joiners: tuple[RankId, ...] = (),
        is_planned: bool = False,
        cause: str = "",
        published_at: float = 0,
    ) -> ExpertMap:
        """What no row holds is computed on demand, if all members can do that."""
        return ExpertMap(
            epoch=Epoch(epoch),
            num_experts=self.spec.num_experts,
            members=tuple(sorted(rows)),
            placement=self.placement(rows),
            joiners=joiners,
            is_planned=is_planned,
            cause=cause,
            published_at=published_at,
            **self._on_demand(rows),
        )

    def available_rows(self, members: Iterable[Member]) -> dict[Member, Placement]:
        return {m: self.available(m) for m in members}

    def intended_rows(self, members: Iterable[Member]) -> dict[Member, Placement]:
        return {m: self.intended(m) for m in members}

    def covers(self, rows: Mapping[Member, Placement]) -> bool:
        """Whether every expert of every layer is in one of the rows."""
        return bool(rows) and bool(self._held(rows).all())

    def serves(self, rows: Mapping[Member, Placement]) -> bool:
        """Whether these members can compute every expert, if need be on demand."""
        return self.covers(rows) or self.can_compute_on_demand(rows)

    def can_compute_on_demand(self, members: Iterable[Member]) -> bool:
        """Whether all of these can. False if there are none."""
        known = [self.state.records.get(member) for member in members]
        return bool(known) and all(r is not None and r.computes_on_demand for r in known)

    def _held(self, rows: Mapping[Member, Placement]) -> NDArray[np.bool_]:
        """`[num_layers, num_experts]`: whether an expert is in one of the rows."""
        num_experts = self.spec.num_experts
        seen = np.zeros((self._shape[0], num_experts + 1), dtype=bool)
        for row in rows.values():
            held = row.astype(np.int64)
            np.put_along_axis(seen, np.where(held >= 0, held, num_experts), True, axis=1)
        return seen[:, :num_experts]

    def _on_demand(self, rows: Mapping[Member, Placement]) -> dict[str, Placement]:
        """The map's field of this name, if it has one: what is in no row, dealt to the members in
        turn, in each layer beginning with another one."""
        missing = ~self._held(rows)
        if not missing.any() or not self.can_compute_on_demand(rows):
            return {}
        members = sorted(rows)
        width = -(-int(missing.sum(axis=1).max()) // len(members))
        shape = (self._shape[0], self.num_ranks, width)
        result = np.full(shape, EMPTY_SLOT, dtype=np.int16)
        for layer, lacking in enumerate(missing):
            for index, expert in enumerate(np.flatnonzero(lacking).tolist()):
                turn, of = divmod(index, len(members))
                member = members[(of + layer) % len(members)]
                result[layer, member.rank, turn] = expert
        return {"on_demand": result}

    def nodes(self, members: Iterable[Member]) -> dict[RankId, NodeId]:
        records = self.state.records
        return {m.rank: records[m].node if m in records else _UNKNOWN_NODE for m in members}

    def slots(self, members: Iterable[Member]) -> dict[RankId, int]:
        records, width = self.state.records, self._shape[1]
        return {m.rank: records[m].slots if m in records else width for m in members}

    def newcomers(self, members: Iterable[Member]) -> list[Member]:
        """The newest incarnation of each rank that is not among `members`, unless it has a verdict,
        nobody wants it, it is to leave, or its record does not fit the spec."""
        taken = {m.rank for m in members}
        return [
            record.member
            for rank, record in sorted(self.state.newest_records().items())
            if rank not in taken
            and rank in self._desired_ranks
            and not self.is_to_leave(record.member)
            and 0 < record.slots <= self.spec.slots_per_rank
            and record.member not in self.state.verdicts
        ]

    def is_to_leave(self, member: Member) -> bool:
        """Whether a drain keeps it out of the map, or ends its membership."""
        return is_to_leave(self.state, member)

    @property
    def num_awaited(self) -> int:
        """How many ranks are to be in the map once all have come."""
        desired = self.state.desired
        staying = {drain.rank for drain in desired.drains if drain.after is AfterDrain.STAY}
        return len(self._desired_ranks - staying)

    def assignments(
        self, wanted: Mapping[Member, Placement], *, epoch: int, force: bool = False
    ) -> tuple[SlotContents, ...]:
        """Assignments for the rows that differ from what is intended, or for all rows if
        `force`."""
        return tuple(
            self._assignment(m, row, epoch)
            for m, row in wanted.items()
            if force or not np.array_equal(row, self.intended(m))
        )

    def _assignment(self, member: Member, row: Placement, epoch: int) -> SlotContents:
        num_slots = self.slots([member])[member.rank]
        before = self.state.assignments.get(member)
        return SlotContents.of(
            member,
            row[:, :num_slots],
            epoch=epoch,
            number=1 + ((before.number or 0) if before is not None else 0),
            disputed=self._disputed_next(member)[:, :num_slots],
        )

    def _disputed(self, member: Member) -> NDArray[np.bool_]:
        """Slots that the rank may be loading for an earlier assignment than its present one."""
        assigned = self.state.assignments.get(member)
        if assigned is None or not assigned.disputed or self._knows_assignment(member):
            return np.zeros(self._shape, dtype=bool)
        try:
            slots = assigned.disputed_slots()
        except WireError:
            return np.ones(self._shape, dtype=bool)
        result = np.zeros(self._shape, dtype=bool)
        result[:, : slots.shape[1]] = slots[:, : self._shape[1]]
        return result

    def _disputed_next(self, member: Member) -> NDArray[np.bool_]:
        """Those of an assignment that replaces the present one now."""
        assigned, resident = self.assigned(member), self.resident(member)
        if assigned is None or resident is None or self._knows_assignment(member):
            return np.zeros(self._shape, dtype=bool)
        differs: NDArray[np.bool_] = assigned != resident
        return self._disputed(member) | differs

    def _knows_assignment(self, member: Member) -> bool:
        """Whether what the rank says of its slots takes account of its present assignment. Earlier
        releases do not count, and are believed."""
        assigned = self.state.assignments.get(member)
        resident = self.state.residents.get(member)
        if assigned is None or assigned.number is None:
            return True
        if resident is None:
            return False
        return resident.number is None or resident.number >= assigned.number

    def _links(self, member: Member) -> Iterable[Member]:
        record = self.state.records.get(member)
        return record.links if record else ()

    def _row(self, contents: SlotContents | None) -> Placement | None:
        if contents is None:
            return None
        try:
            row = contents.array()
        except WireError:
            return None
        if row.shape[0] != self._shape[0] or row.shape[1] > self._shape[1]:
            return None
        return self.widen(row)


def is_to_leave(state: ClusterState, member: Member) -> bool:
    """Whether a drain keeps this member out of the map, or ends its membership."""
    spec, record = state.spec, state.records.get(member)
    if spec is None:
        return False
    process = member.incarnation if record is None else record.first_incarnation
    node = None if record is None else record.node
    return state.desired.is_to_leave(member.rank, process, node, num_ranks=spec.num_ranks)


def _num_rows(state: ClusterState, spec: InstanceSpec, desired: Collection[RankId]) -> int:
    """Rows of a map: one for each rank number that a member has or may have."""
    members = state.expert_map.members if state.expert_map is not None else ()
    highest = max((*desired, *(m.rank for m in members)), default=0)
    return max(spec.capacity, highest + 1)


def _with_rows(on_demand: Placement, members: Iterable[Member], num_ranks: int) -> Placement:
    """A map's `on_demand`, with a row for each of so many ranks."""
    if not on_demand.size:
        return on_demand
    result = np.full((on_demand.shape[0], num_ranks, on_demand.shape[2]), EMPTY_SLOT, np.int16)
    ranks = [m.rank for m in members]
    result[:, ranks] = on_demand[:, ranks]
    return result
