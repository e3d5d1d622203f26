"""Loads from a checkpoint folder what a CUDA rank's decoder is built of: shared weights, empty
expert slots and their loader. Imports neither numba nor Triton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, open_checkpoint
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.experts.expert_cache import ExpertCacheHeader
from gpu_worker.cuda.experts.expert_reader import ExpertSource
from gpu_worker.cuda.experts.host_experts import HostExperts, open_host_experts
from gpu_worker.cuda.experts.slot_loader import CudaSlotLoader, open_slot_loader
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.weights.checkpoint_layouts import checkpoint_layout_of
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.expert_cache_memory import ExpertCacheMemory
from shared.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaModel:
    """A loaded model. `slots` are empty until `loader` fills them."""

    sizes: DecoderSizes
    weights: DecoderWeights
    slots: CudaSlots
    loader: CudaSlotLoader
    host_experts: HostExperts


def load_cuda_model(
    folder: Path,
    spec: ModelSpec,
    *,
    slots_per_rank: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: LoadProgress,
    cache_memory: ExpertCacheMemory | None = None,
) -> CudaModel:
    """Reads the shared weights and allocates the slots. Copies of experts go into `cache_memory`.
    Raises CheckpointError; if the architecture or the files are wrong, before it reads anything."""
    layout = checkpoint_layout_of(spec)
    checkpoint = open_checkpoint(folder, layout.tensor_shapes(), progress.count)
    weights = layout.read(WeightReader(checkpoint, device, dtype))
    reader = layout.open_experts(checkpoint, dtype)
    slots = CudaSlots(
        num_layers=spec.num_moe_layers,
        slots_per_rank=slots_per_rank,
        hidden_size=spec.hidden_size,
        inner_size=spec.moe_intermediate_size,
        device=device,
        dtype=dtype,
        biased=reader.form.biased,
    )
    header = expert_cache_header(checkpoint, reader, spec)
    host_experts = open_host_experts(reader, cache_memory, header, device)
    loader = open_slot_loader(
        slots=slots,
        reader=reader,
        host_experts=host_experts,
        progress=progress,
        device=device,
    )
    return CudaModel(
        sizes=layout.sizes, weights=weights, slots=slots, loader=loader, host_experts=host_experts
    )


def expert_cache_header(
    checkpoint: Checkpoint, reader: ExpertSource, spec: ModelSpec
) -> ExpertCacheHeader:
    return ExpertCacheHeader(
        folder=str(checkpoint.folder),
        fingerprint=checkpoint.fingerprint(),
        dtype=str(reader.form.dtype),
        num_values=reader.form.num_values,
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
    )
