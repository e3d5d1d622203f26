"""Which experts sit in which slots of which ranks: a pure planner over numpy arrays. It decides and
never loads; the control plane publishes what it answers."""

from control_plane.placement.fault_tolerance import advise, compute_fault_tolerance, describe
from control_plane.placement.grow import grow
from control_plane.placement.heal import heal
from control_plane.placement.place import place
from control_plane.placement.results import (
    Advice,
    FaultTolerance,
    GrowResult,
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
