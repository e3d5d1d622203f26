"""The expert map: which expert each slot of each rank holds, in one epoch. Data and look-ups only;
the control plane decides where experts go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.errors import WireError
from shared.types import ABSENT_SLOT, EMPTY_SLOT, Epoch, Incarnation, Member, RankId

Placement = NDArray[np.int16]
"""`[num_layers, num_ranks, slots_per_rank]`: the expert in each slot, or EMPTY_SLOT, or
ABSENT_SLOT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMap:
    """An immutable snapshot of who takes part in steps, and of what their slots hold.

    `placement` is int16; rows of ranks that are not in `members` are EMPTY_SLOT or ABSENT_SLOT.
    `on_demand` is `[num_layers, num_ranks, P]` int16: experts that no slot has room for, which the
    rank computes with weights that it reads for the step. In a message they follow the rank's
    slots. P is 0 unless there are fewer slots than experts.
    `joiners` are the members that have not yet been seen to step under an earlier map. Ranks that
    meet by counting CUDA graph launches restart their count with them.
    `is_planned`: nobody has died since the map before, so that its members can go on under it until
    all have heard of this one.
    `cause` says in words why this epoch follows the last one.
    `published_at` is the publisher's `Clock.now()` in seconds, for measurements on one host.
    """

    epoch: Epoch
    num_experts: int
    members: tuple[Member, ...]
    placement: Placement
    joiners: tuple[RankId, ...] = ()
    is_planned: bool = False
    cause: str = ""
    published_at: float = 0.0
    on_demand: Placement = field(default_factory=lambda: np.zeros((0, 0, 1), dtype=np.int16))
    _incarnations: dict[RankId, Incarnation] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.placement.setflags(write=False)
        object.__setattr__(self, "_incarnations", {m.rank: m.incarnation for m in self.members})

    @property
    def num_layers(self) -> int:
        return int(self.placement.shape[0])

    @property
    def num_ranks(self) -> int:
        return int(self.placement.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return int(self.placement.shape[2])

    @property
    def computed(self) -> Placement:
        """`[num_layers, num_ranks, slots_per_rank + P]`: what each rank computes, in its slots and
        then on demand."""
        if not self.on_demand.size:
            return self.placement
        return np.concatenate((self.placement, self.on_demand), axis=2)

    def on_demand_of(self, rank: RankId) -> Placement:
        """`[num_layers, P]`; without any, it is empty."""
        return self.on_demand[:, rank] if self.on_demand.size else self.on_demand[:, :, 0]

    def incarnation_of(self, rank: RankId) -> Incarnation | None:
        """The incarnation that takes part, or None if the rank is not a member."""
        return self._incarnations.get(rank)

    def has(self, member: Member) -> bool:
        return self._incarnations.get(member.rank) == member.incarnation

    def replica_counts(self) -> NDArray[np.int32]:
        """`[num_layers, num_experts]`: the number of slots that hold each expert."""
        flat = self.placement.reshape(self.num_layers, -1).astype(np.int64)
        counts = np.zeros((self.num_layers, self.num_experts + 2), dtype=np.int32)
        layers = np.repeat(np.arange(self.num_layers), flat.shape[1])
        np.add.at(counts, (layers, flat.ravel() - ABSENT_SLOT), 1)
        return counts[:, -ABSENT_SLOT:]

    def num_uncovered(self, ranks: Collection[RankId]) -> int:
        """`(layer, expert)` pairs that none of these ranks computes."""
        live = [rank for rank in ranks if rank < self.num_ranks]
        held = self.computed[:, live].reshape(self.num_layers, -1)
        covered = sum(np.unique(row[row >= 0]).size for row in held)
        return self.num_layers * self.num_experts - int(covered)

    def uncovered(self) -> list[tuple[int, int]]:
        """`(layer, expert)` pairs that no member computes. A published map has none."""
        is_open = self.replica_counts() == 0
        layer, rank, place = np.nonzero(self.on_demand >= 0)
        is_open[layer, self.on_demand[layer, rank, place]] = False
        return [(int(a), int(b)) for a, b in np.argwhere(is_open)]

    def to_wire(self) -> dict[str, object]:
        return {
            "epoch": self.epoch,
            "num_experts": self.num_experts,
            "members": [[m.rank, m.incarnation] for m in self.members],
            "shape": list(self.placement.shape),
            "placement": np.ascontiguousarray(self.placement, dtype="<i2").tobytes(),
            "joiners": list(self.joiners),
            "is_planned": self.is_planned,
            "cause": self.cause,
            "published_at": self.published_at,
            "on_demand": np.ascontiguousarray(self.on_demand, dtype="<i2").tobytes(),
        }

    @classmethod
    def from_wire(cls, raw: dict[str, object]) -> ExpertMap:
        """Raises WireError if a field is missing or contradicts another."""
        try:
            shape = tuple(int(n) for n in raw["shape"])  # type: ignore[attr-defined]
            placement = np.frombuffer(raw["placement"], dtype="<i2").reshape(shape)  # type: ignore[call-overload]
            on_demand = np.frombuffer(raw.get("on_demand", b""), dtype="<i2")  # type: ignore[call-overload]
            width = (*shape[:2], -1) if on_demand.size else (0, 0, 1)
            members = tuple(
                Member(rank=RankId(int(r)), incarnation=Incarnation(int(i)))
                for r, i in raw["members"]  # type: ignore[attr-defined]
            )
            result = cls(
                epoch=Epoch(int(raw["epoch"])),  # type: ignore[call-overload]
                num_experts=int(raw["num_experts"]),  # type: ignore[call-overload]
                members=members,
                placement=placement.astype(np.int16),
                joiners=tuple(RankId(int(r)) for r in raw.get("joiners", ())),  # type: ignore[attr-defined]
                is_planned=bool(raw.get("is_planned", False)),
                cause=str(raw["cause"]),
                published_at=float(raw["published_at"]),  # type: ignore[arg-type]
                on_demand=on_demand.reshape(width).astype(np.int16),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"malformed expert map: {error}") from error
        if placement.ndim != 3 or int(placement.max(initial=EMPTY_SLOT)) >= result.num_experts:
            raise WireError("malformed expert map: placement and num_experts disagree")
        if int(on_demand.max(initial=EMPTY_SLOT)) >= result.num_experts:
            raise WireError("malformed expert map: on_demand and num_experts disagree")
        if any(result.incarnation_of(rank) is None for rank in result.joiners):
            raise WireError("malformed expert map: a joiner is no member")
        return result
