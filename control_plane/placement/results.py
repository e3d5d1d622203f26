"""The planner's results, and the array types that its functions share."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.expert_map import Placement
from shared.types import ExpertId, NodeId, RankId, SlotId

Loads = NDArray[np.floating] | NDArray[np.integer]
"""`[num_layers, num_experts]`: the tokens, or any other measure of work, that each expert gets."""


HealReason = Literal["cover", "spread", "spare", "redundancy", "balance"]
"""Why `heal` changes something: "cover" gives an expert without a replica one, "spread" gives it
more ranks or nodes, "spare" empties a surplus slot, "redundancy" fills an empty one, "balance"
moves load."""


class LayerExpert(NamedTuple):
    """An expert of one layer."""

    layer: int
    expert: ExpertId


class SlotFill(NamedTuple):
    """An expert to load into a slot."""

    layer: int
    rank: RankId
    slot: SlotId
    expert: ExpertId


class PlacementPlan(NamedTuple):
    """A fresh placement. `unplaced_experts` are those that found no slot, the least loaded
    first."""

    placement: Placement  # [num_layers, num_ranks, slots_per_rank]
    unplaced_experts: tuple[LayerExpert, ...]


class ShrinkResult(NamedTuple):
    """The map after a death.

    `placement` has the survivors' slots exactly as they were, and the dead ranks' slots empty. If
    `slot_fills` is empty, it can be published at once. Otherwise all of `slot_fills` must be loaded
    first, and then `refilled` is published: it differs from `placement` only in the filled slots
    (empty ones, and those of surplus replicas). `uncoverable` are the least loaded orphans, for
    which the survivors have no slot left. Both placements are `[num_layers, num_ranks,
    slots_per_rank]` int16.
    """

    placement: Placement
    slot_fills: tuple[SlotFill, ...]
    refilled: Placement
    uncoverable: tuple[LayerExpert, ...]


class GrowResult(NamedTuple):
    """The placement with the joiners: the members' slots as they were, the joiners' filled.
    `slot_fills` are the joiners' loads."""

    placement: Placement
    slot_fills: tuple[SlotFill, ...]


class HealStep(NamedTuple):
    """One safe step: publish `emptied`, load `slot_fills`, publish `placement`.

    Both placements hold every expert that the map before held. If all slots to fill were empty
    already, `emptied` equals the map before and need not be published. If slots are only emptied,
    `slot_fills` is empty and `emptied` equals `placement`. `bytes` is the weights to load.
    """

    emptied: Placement
    slot_fills: tuple[SlotFill, ...]
    placement: Placement
    bytes: int
    reason: HealReason  # of the step's most urgent change


class HealPlan(NamedTuple):
    """The next step of a heal, None if nothing is worth a move. `takes_candidate`: it is the first
    step of a rebalance, for loads seen lately. `slowness` is then that of the map (see
    `rebalancer.slowness`) and that after all steps of the rebalance."""

    step: HealStep | None
    takes_candidate: bool = False
    slowness: tuple[float, float] = (1.0, 1.0)


class FaultTolerance(NamedTuple):
    """Which failures a map survives, whichever ranks or nodes they hit.

    Without a reload, every expert keeps a replica. With a reload, the survivors' slots suffice for
    every expert, but serving waits for weights from host memory or disk. `at_risk_*` are the
    experts whose replicas are all on one rank or node. `lost_by_*` is the number of experts, over
    all layers, whose last replica is lost with each rank or node.
    """

    rank_failures: int
    node_failures: int
    rank_failures_with_reload: int
    node_failures_with_reload: int
    at_risk_of_rank: tuple[LayerExpert, ...]
    at_risk_of_node: tuple[LayerExpert, ...]
    lost_by_rank: dict[RankId, int]
    lost_by_node: dict[NodeId, int]


class Advice(NamedTuple):
    """The redundancy that survives `rank_failures` without a reload, and the slots that it
    needs."""

    rank_failures: int
    node_failures: int
    redundant: int
    slots_per_rank: int
