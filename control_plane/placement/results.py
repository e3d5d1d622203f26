"""What the planner answers: named results, and the shapes that its functions share."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.expert_map import Placement
from shared.types import ExpertId, NodeId, RankId, SlotId

Loads = NDArray[np.floating] | NDArray[np.integer]
"""`[num_layers, num_experts]`: tokens (or any measure of work) that each expert receives."""


HealReason = Literal["cover", "spread", "spare", "redundancy", "balance"]
"""Why `heal` changes something; "spare" gives a slot back."""


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
    """A fresh placement. `unplaced_experts` lists, coldest first, the experts that found no
    slot."""

    placement: Placement  # [num_layers, num_ranks, slots_per_rank]
    unplaced_experts: tuple[LayerExpert, ...]


class ShrinkResult(NamedTuple):
    """The map after a death.

    `placement` has the survivors' slots exactly as they were and the dead ranks' slots empty. Where
    `slot_fills` is empty it can be published at once. Otherwise all of `slot_fills` must be loaded
    before serving goes on, and `refilled` is the placement to publish then: it differs from
    `placement` in the refilled slots alone (empty ones first, then those of surplus replicas).
    `uncoverable` are the coldest orphans, for which the survivors have no slot left.
    """

    placement: Placement
    slot_fills: tuple[SlotFill, ...]
    refilled: Placement
    uncoverable: tuple[LayerExpert, ...]


class GrowResult(NamedTuple):
    """The map with the joiners: members' slots as they were, the joiners' filled by `loads`."""

    placement: Placement
    slot_fills: tuple[SlotFill, ...]


class HealStep(NamedTuple):
    """One safe step: publish `emptied`, load `slot_fills`, publish `placement`.

    Both maps cover what the map before covered. `emptied` equals the map before where the slots to
    fill were empty already (then it need not be published); `slot_fills` is empty where slots are
    given back as spare ones (then `emptied` equals `placement`).
    """

    emptied: Placement
    slot_fills: tuple[SlotFill, ...]
    placement: Placement
    bytes: int
    reason: HealReason  # of its most urgent change


class FaultTolerance(NamedTuple):
    """Which failures a map survives, whichever ranks or nodes they hit.

    Without reload: every expert keeps a replica. With reload: the survivors' slots suffice for
    every expert, but serving waits for weights from host memory or disk. `at_risk_*` are the
    experts with replicas on one rank (node) only; `lost_by_*` counts, summed over layers, what dies
    with each.
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
    """The redundancy that survives so many failures without a reload, and the room it takes."""

    rank_failures: int
    node_failures: int
    redundant: int
    slots_per_rank: int
