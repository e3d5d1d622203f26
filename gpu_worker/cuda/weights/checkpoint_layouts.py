"""Which architectures CUDA ranks serve, and how the checkpoint of each is laid out. Imports neither
numba nor Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.cuda.experts.expert_reader import ExpertSource
from gpu_worker.cuda.weights.common_weights import check_tiles
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights
from gpu_worker.cuda.weights.deepseek_weights import deepseek_layout
from gpu_worker.cuda.weights.glm4_moe_weights import glm4_moe_layout
from gpu_worker.cuda.weights.gpt_oss_weights import gpt_oss_layout
from gpu_worker.cuda.weights.mixtral_weights import mixtral_layout
from gpu_worker.cuda.weights.olmoe_weights import olmoe_layout
from gpu_worker.cuda.weights.qwen3_moe_weights import qwen3_moe_layout
from gpu_worker.cuda.weights.qwen3_weights import qwen3_layout
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

    @property
    def expert_prefixes(self) -> frozenset[str]:
        """See `decoder_layout.MlpPart`, as of `open_experts`."""
        ...

    def open_experts(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> ExpertSource: ...

    def read(self, reader: WeightReader) -> DecoderWeights:
        """Raises CheckpointError."""
        ...


CHECKPOINT_LAYOUTS: dict[str, Callable[[ModelSpec], CheckpointLayout]] = {
    "DeepseekV2ForCausalLM": partial(deepseek_layout, sigmoid=False, has_indexer=False),
    "DeepseekV3ForCausalLM": partial(deepseek_layout, sigmoid=True, has_indexer=False),
    "DeepseekV32ForCausalLM": partial(deepseek_layout, sigmoid=True, has_indexer=True),
    "Glm4MoeForCausalLM": glm4_moe_layout,
    "GptOssForCausalLM": gpt_oss_layout,
    "MixtralForCausalLM": mixtral_layout,
    "OlmoeForCausalLM": olmoe_layout,
    "Qwen3ForCausalLM": qwen3_layout,
    "Qwen3MoeForCausalLM": qwen3_moe_layout,
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
