"""Which architectures CUDA ranks serve, and how the checkpoint of each is laid out. Imports neither
numba nor Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.cuda.weights.common_weights import check_tiles
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights
from gpu_worker.cuda.weights.deepseek_weights import DeepseekCheckpoint
from gpu_worker.cuda.weights.qwen3_moe_weights import Qwen3MoeCheckpoint
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec


class CheckpointLayout(Protocol):
    """The checkpoint of one architecture, for one config.json."""

    @property
    def sizes(self) -> DecoderSizes: ...

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every tensor of a complete checkpoint that a CUDA rank reads."""
        ...

    def expert_prefix(self, layer: int, expert: int) -> str:
        """What the names of an expert's tensors begin with. `layer` counts only the MoE layers."""
        ...

    def read(self, reader: WeightReader) -> DecoderWeights:
        """Raises CheckpointError."""
        ...


CHECKPOINT_LAYOUTS: dict[str, Callable[[ModelSpec], CheckpointLayout]] = {
    "DeepseekV2ForCausalLM": partial(DeepseekCheckpoint, sigmoid=False, has_indexer=False),
    "DeepseekV3ForCausalLM": partial(DeepseekCheckpoint, sigmoid=True, has_indexer=False),
    "DeepseekV32ForCausalLM": partial(DeepseekCheckpoint, sigmoid=True, has_indexer=True),
    "Qwen3MoeForCausalLM": Qwen3MoeCheckpoint,
}
"""By the architecture in config.json. Each raises CheckpointError for options that CUDA ranks do
not serve."""


def checkpoint_layout_of(spec: ModelSpec) -> CheckpointLayout:
    """Raises CheckpointError if CUDA ranks do not serve the model."""
    if spec.architecture not in CHECKPOINT_LAYOUTS:
        raise CheckpointError(
            f"CUDA ranks do not serve {spec.architecture}, but {', '.join(CHECKPOINT_LAYOUTS)}; "
            "start the ranks with --device cpu"
        )
    layout = CHECKPOINT_LAYOUTS[spec.architecture](spec)
    check_tiles(layout.sizes)
    return layout
