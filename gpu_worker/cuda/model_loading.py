"""From a checkpoint folder to what a CUDA rank's decoder is built of. Which architectures CUDA
ranks serve stands here. Imports neither numba nor Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from gpu_worker.cuda.common_weights import check_tiles
from gpu_worker.cuda.decoder_sizes import DecoderSizes
from gpu_worker.cuda.decoder_weights import DecoderWeights
from gpu_worker.cuda.deepseek_weights import DeepseekWeights
from gpu_worker.cuda.expert_reader import ExpertReader
from gpu_worker.cuda.host_experts import HostExperts, bytes_for_copies
from gpu_worker.cuda.host_memory import free_bytes
from gpu_worker.cuda.qwen3_moe_weights import Qwen3MoeWeights
from gpu_worker.cuda.slot_loader import CudaSlotLoader
from gpu_worker.cuda.slots import CudaSlots
from gpu_worker.cuda.weight_reader import WeightReader
from gpu_worker.load_progress import LoadProgress
from gpu_worker.model.checkpoint import Shape, open_checkpoint
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec


class CheckpointLayout(Protocol):
    """One architecture, for one config.json. `expert_prefix` counts MoE layers alone."""

    @property
    def sizes(self) -> DecoderSizes: ...

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every tensor that a complete checkpoint has and a CUDA rank reads."""
        ...

    def expert_prefix(self, layer: int, expert: int) -> str: ...

    def read(self, reader: WeightReader) -> DecoderWeights: ...


LAYOUTS: dict[str, Callable[[ModelSpec], CheckpointLayout]] = {
    "DeepseekV2ForCausalLM": partial(DeepseekWeights, sigmoid=False, has_indexer=False),
    "DeepseekV3ForCausalLM": partial(DeepseekWeights, sigmoid=True, has_indexer=False),
    "DeepseekV32ForCausalLM": partial(DeepseekWeights, sigmoid=True, has_indexer=True),
    "Qwen3MoeForCausalLM": Qwen3MoeWeights,
}
"""By the architecture that config.json names. Each raises CheckpointError for what is not built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaModel:
    """`slots` are empty until `loader` has filled them."""

    sizes: DecoderSizes
    weights: DecoderWeights
    slots: CudaSlots
    loader: CudaSlotLoader
    copies: HostExperts


def load_cuda_model(
    folder: Path,
    spec: ModelSpec,
    *,
    slots_per_rank: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: LoadProgress,
    host_experts_gb: float | None = None,
    ranks_of_host: int = 1,
) -> CudaModel:
    """Reads the shared weights and makes room for slots. Raises CheckpointError, before anything is
    read where the architecture or the files are not as they should be."""
    layout = layout_of(spec)
    checkpoint = open_checkpoint(folder, layout.tensor_shapes(), progress.count)
    weights = layout.read(WeightReader(checkpoint, device, dtype))
    slots = CudaSlots(
        num_layers=spec.num_moe_layers,
        slots_per_rank=slots_per_rank,
        hidden_size=spec.hidden_size,
        inner_size=spec.moe_intermediate_size,
        device=device,
        dtype=dtype,
    )
    reader = ExpertReader(checkpoint, layout.expert_prefix, dtype)
    copies = HostExperts(
        reader,
        bytes_max=bytes_for_copies(host_experts_gb, free_bytes(), ranks_of_host),
        device=device,
    )
    copies.reserve(spec.num_moe_layers * spec.num_experts)
    loader = CudaSlotLoader(
        slots=slots,
        reader=reader,
        copies=copies,
        num_experts=spec.num_experts,
        progress=progress,
        device=device,
    )
    return CudaModel(sizes=layout.sizes, weights=weights, slots=slots, loader=loader, copies=copies)


def layout_of(spec: ModelSpec) -> CheckpointLayout:
    """Raises CheckpointError where CUDA ranks do not serve the model."""
    if spec.architecture not in LAYOUTS:
        raise CheckpointError(
            f"CUDA ranks do not serve {spec.architecture}, but {', '.join(LAYOUTS)}; start the "
            "ranks with --device cpu"
        )
    layout = LAYOUTS[spec.architecture](spec)
    check_tiles(layout.sizes)
    return layout
