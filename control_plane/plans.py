"""Calls the planner with the present state of the instance: for a first placement, for deaths, for
joiners. Membership decides whether a plan is needed and what to do with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from control_plane.placement import (
    GrowResult,
    Loads,
    PlacementPlan,
    ShrinkResult,
    grow,
    place,
    shrink,
)
from control_plane.residency import Residency
from shared.expert_map import ExpertMap, Placement
from shared.types import EMPTY_SLOT, Member, RankId


def plan_formation(
    residency: Residency, members: Sequence[Member], *, survive: int
) -> PlacementPlan:
    """A placement for `members` that ignores what their slots hold."""
    spec = residency.spec
    loads = np.ones((spec.num_moe_layers, spec.num_experts))
    return place(
        loads,
        [m.rank for m in members],
        residency.nodes(members),
        residency.slots(members),
        redundant=spec.redundant_experts,
        num_ranks=residency.num_ranks,
        survive=survive,
    )


def plan_what_is_missing(
    residency: Residency, held: Mapping[Member, Placement]
) -> dict[Member, Placement] | None:
    """Rows for all members of `held`, so that they hold all experts together. Those that hold
    something keep it, apart from surplus replicas if the slots are needed; the others are filled.
    None if nobody holds anything, or if there are too few slots."""
    holders = {m: row for m, row in held.items() if (row >= 0).any()}
    if not holders:
        return None
    rows = dict(held)
    if others := [m for m in held if m not in holders]:
        grown = grow(
            residency.map_of(holders, epoch=1),
            [m.rank for m in others],
            residency.nodes(held),
            residency.slots(held),
            redundant=residency.spec.redundant_experts,
        )
        rows |= {m: residency.widen(grown.placement[:, m.rank]) for m in others}
    if residency.covers(rows):
        return rows
    result = shrink(residency.map_of(rows, epoch=1), ())
    if result.uncoverable:
        return None
    return {m: result.refilled[:, m.rank] for m in rows}


def plan_shrink(
    residency: Residency,
    expert_map: ExpertMap,
    survivors: Sequence[Member],
    dead: Sequence[Member],
    unproven: Collection[RankId],
    loads: Loads | None,
) -> ShrinkResult:
    """Starts from what the survivors are meant to hold, so that orphans that are being loaded stay
    where they are. `unproven`: see `shrink`."""
    rows = residency.intended_rows(survivors)
    rows |= {m: expert_map.placement[:, m.rank] for m in dead}
    base = residency.map_of(rows, epoch=expert_map.epoch)
    return shrink(base, [m.rank for m in dead], loads, unproven=unproven)


def plan_leave(
    residency: Residency,
    expert_map: ExpertMap,
    rest: Sequence[Member],
    leaving: Sequence[Member],
    unproven: Collection[RankId],
    loads: Loads | None,
) -> dict[Member, Placement] | None:
    """Rows for `rest`, so that they hold every expert without `leaving`, who live. What is being
    loaded is waited for. None: not now, or `rest` have too few slots."""
    if not rest or not all(residency.is_settled(m) for m in rest):
        return None
    result = plan_shrink(residency, expert_map, rest, leaving, unproven, loads)
    if result.uncoverable:
        return None
    return {m: result.refilled[:, m.rank] for m in rest}


def emptied_for(
    residency: Residency, expert_map: ExpertMap, wanted: Mapping[Member, Placement]
) -> dict[Member, Placement]:
    """The map's rows and what has been loaded since, less what `wanted` has something else for:
    that may be surplus because of what has been loaded."""
    rows = {}
    for member in expert_map.members:
        row = expert_map.placement[:, member.rank]
        row = np.where(row < 0, residency.available(member), row)
        if member in wanted:
            row = np.where(row == wanted[member], row, np.minimum(row, EMPTY_SLOT))
        rows[member] = row.astype(np.int16)
    return rows


def plan_join(
    residency: Residency,
    expert_map: ExpertMap,
    known: Sequence[Member],
    joiners: Sequence[Member],
    loads: Loads | None,
) -> GrowResult:
    """Assumes that `known` hold what they are meant to hold. `joiners` have what they report: they
    may have come back in their process."""
    everybody = [*known, *joiners]
    return grow(
        residency.map_of(residency.intended_rows(known), epoch=expert_map.epoch),
        [m.rank for m in joiners],
        residency.nodes(everybody),
        residency.slots(everybody),
        loads,
        redundant=residency.spec.redundant_experts,
        resident={m.rank: row for m in joiners if (row := residency.resident(m)) is not None},
    )
