"""Small safe steps from the present map to a covered, spread and balanced one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from control_plane.placement.results import HealStep, Loads
from shared.expert_map import ExpertMap
from shared.types import NodeId, RankId


def heal(
    expert_map: ExpertMap,
    loads: Loads | None,
    nodes: Mapping[RankId, NodeId],
    *,
    budget_bytes: int,
    bytes_per_expert: int,
    redundant: int | None = None,
    survive: int = 0,
    tolerance: float = 0.05,
) -> Iterator[HealStep]:
    """Steps of at most `budget_bytes` of weights each (at least one expert). Lazy: take the first,
    perform it, and ask again with the new map; the answer goes on where it stopped. Ends at once
    where nothing is worth a move: every expert as replicated as `redundant` slots allow, and the
    busiest rank of each layer within `tolerance` of the mean."""
    yield from ()
