"""Which class serves which architecture: one line per model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpu_worker.model.kernels import warm_up
from gpu_worker.model.qwen3_moe import Qwen3Moe
from shared.model_spec import read_model_spec

MODELS = {
    "Qwen3MoeForCausalLM": Qwen3Moe,
}


def load_model(
    folder: Path,
    *,
    slots_per_rank: int,
    kv_blocks: int,
    block_tokens: int,
    on_warm_up: Callable[[int, int], None] | None = None,
) -> Qwen3Moe:
    """A model ready to step once its expert slots are loaded: kernels compiled, shared weights
    read. Raises CheckpointError; checks the checkpoint before it spends time on the kernels."""
    spec = read_model_spec(folder)
    model = MODELS[spec.architecture](
        folder=folder,
        spec=spec,
        slots_per_rank=slots_per_rank,
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
    )
    warm_up(on_warm_up)
    return model
