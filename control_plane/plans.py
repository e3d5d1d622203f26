"""Calls the planner with the present state of the instance: for a first placement, for deaths, for
joiners. Membership decides whether a plan is needed and what to do with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from control_plane.placement import GrowResult, PlacementPlan, ShrinkResult, grow, place, shrink
from control_plane.residency import Residency
from shared.expert_map import ExpertMap
from shared.types import Member


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
        num_ranks=spec.num_ranks,
        survive=survive,
    )


def plan_shrink(
    residency: Residency,
    expert_map: ExpertMap,
    survivors: Sequence[Member],
    dead: Sequence[Member],
) -> ShrinkResult:
    """Starts from what the survivors are meant to hold, so that orphans that are being loaded stay
    where they are."""
    rows = residency.intended_rows(survivors)
    rows |= {m: expert_map.placement[:, m.rank] for m in dead}
    base = residency.map_of(rows, epoch=expert_map.epoch)
    return shrink(base, [m.rank for m in dead])


def plan_join(
    residency: Residency,
    expert_map: ExpertMap,
    known: Sequence[Member],
    joiners: Sequence[Member],
) -> GrowResult:
    """Assumes that `known` hold what they are meant to hold, and that `joiners` hold nothing."""
    everybody = [*known, *joiners]
    return grow(
        residency.map_of(residency.intended_rows(known), epoch=expert_map.epoch),
        [m.rank for m in joiners],
        residency.nodes(everybody),
        residency.slots(everybody),
        redundant=residency.spec.redundant_experts,
    )
