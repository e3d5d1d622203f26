"""The names and shapes of a gated MLP's matrices in checkpoints."""

from __future__ import annotations

from typing import NamedTuple

from gpu_worker.checkpoint.checkpoint import Shape


class MlpNames(NamedTuple):
    """A family's names for the three matrices of a gated MLP."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


USUAL_NAMES = MlpNames()


def mlp_shapes(
    prefix: str, hidden_size: int, inner_size: int, names: MlpNames = USUAL_NAMES
) -> dict[str, Shape]:
    """Shapes of a gated MLP's tensors, by name."""
    return {
        f"{prefix}.{names.gate}.weight": (inner_size, hidden_size),
        f"{prefix}.{names.up}.weight": (inner_size, hidden_size),
        f"{prefix}.{names.down}.weight": (hidden_size, inner_size),
    }
