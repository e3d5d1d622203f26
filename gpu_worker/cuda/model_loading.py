"""Loads from a checkpoint folder what a CUDA rank's decoder is built of: shared weights, empty
expert slots and their loader. Imports neither numba nor Triton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, open_checkpoint
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.card_memory import CardMemory, shared_weight_bytes
from gpu_worker.cuda.experts.expert_cache import ExpertCacheHeader
from gpu_worker.cuda.experts.expert_reader import ExpertSource
from gpu_worker.cuda.experts.host_experts import HostExperts, open_host_experts
from gpu_worker.cuda.experts.slot_loader import CudaSlotLoader, open_slot_loader
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.weights.checkpoint_layouts import checkpoint_layout_of
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights
from gpu_worker.cuda.weights.staged_copy import StagedCopy
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.expert_cache_memory import ExpertCacheMemory
from shared.model_spec import ModelSpec

log = structlog.get_logger()


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
    kv_tokens: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> CudaModel:
    """Reads the shared weights and allocates the slots. Copies of experts go into `cache_memory`,
    which a thread pins until `HostExperts.end_pinning`: call that before a step runs.

    Before it reads anything, raises CheckpointError if the architecture or the files are wrong, and
    ConfigError if the card has no room for all of it and a KV cache of `kv_tokens`, in
    `kv_dtype` or the model's own."""
    layout = checkpoint_layout_of(spec)
    shapes = layout.tensor_shapes()
    checkpoint = open_checkpoint(folder, shapes, progress.count)
    prefixes = layout.expert_prefixes
    reader = layout.open_experts(checkpoint, dtype, device)
    needed = CardMemory(
        form=reader.form,
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
        slots_per_rank=slots_per_rank,
        shared_bytes=shared_weight_bytes(checkpoint, list(shapes), prefixes, dtype.itemsize),
        kv_bytes_per_token=layout.sizes.kv_bytes_per_token(
            dtype.itemsize, (kv_dtype or dtype).itemsize
        ),
        kv_tokens=kv_tokens,
    )
    _check_card(needed, device)
    header = expert_cache_header(checkpoint, reader, spec)
    host_experts = open_host_experts(reader, cache_memory, header)
    with StagedCopy(device) as staged_copy:
        weights = layout.read(WeightReader(checkpoint, device, dtype, staged_copy))
    host_experts.start_pinning(device)  # not before: copies to the card would wait for it
    slots = CudaSlots(
        num_layers=spec.num_moe_layers,
        slots_per_rank=slots_per_rank,
        hidden_size=spec.hidden_size,
        inner_size=spec.moe_intermediate_size,
        device=device,
        dtype=dtype,
        number_format=reader.form.number_format,
        biased=reader.form.biased,
    )
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


def _check_card(needed: CardMemory, device: torch.device) -> None:
    """Raises ConfigError."""
    if device.type != "cuda":
        return
    free_bytes, _ = torch.cuda.mem_get_info(device)
    log.info("card_memory", **needed.log_fields(), free_gb=round(free_bytes / 1e9, 2))
    needed.check(free_bytes)


def expert_cache_header(
    checkpoint: Checkpoint, reader: ExpertSource, spec: ModelSpec
) -> ExpertCacheHeader:
    return ExpertCacheHeader(
        folder=str(checkpoint.folder),
        fingerprint=checkpoint.fingerprint(),
        dtype=str(reader.form.flat_dtype),
        num_values=reader.form.num_values,
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
    )
