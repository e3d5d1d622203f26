"""Which experts are in which slots of which ranks: a pure planner over numpy arrays. It loads
nothing; the control plane publishes its results.

Shapes: placements are `[num_layers, num_ranks, slots_per_rank]` int16, loads are `[num_layers,
num_experts]`, counts are `[num_layers, num_experts]` int64. The planner follows EPLB, DeepSeek's
expert-parallelism load balancer (https://github.com/deepseek-ai/EPLB): first the number of replicas
of each expert, then packing them into ranks. Each module names what it takes from there.
"""

from control_plane.placement.fault_tolerance import advise, compute_fault_tolerance, describe
from control_plane.placement.grow import grow
from control_plane.placement.heal import heal
from control_plane.placement.place import place
from control_plane.placement.results import (
    Advice,
    FaultTolerance,
    GrowResult,
    HealPlan,
    HealStep,
    LayerExpert,
    Loads,
    PlacementPlan,
    ShrinkResult,
    SlotFill,
)
from control_plane.placement.shrink import shrink
from control_plane.placement.topology import balance, rank_loads, replica_counts

__all__ = [
    "Advice",
    "FaultTolerance",
    "GrowResult",
    "HealPlan",
    "HealStep",
    "LayerExpert",
    "Loads",
    "PlacementPlan",
    "ShrinkResult",
    "SlotFill",
    "advise",
    "balance",
    "compute_fault_tolerance",
    "describe",
    "grow",
    "heal",
    "place",
    "rank_loads",
    "replica_counts",
    "shrink",
]
