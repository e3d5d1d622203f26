"""Loads from a checkpoint folder what a CUDA rank's decoder is built of: shared weights, empty
expert slots and their loader. Imports neither numba nor Triton."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, open_checkpoint
from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.experts.expert_cache import ExpertCacheHeader
from gpu_worker.cuda.experts.expert_reader import ExpertReader, are_scaled
from gpu_worker.cuda.experts.host_experts import HostExperts, open_host_experts
from gpu_worker.cuda.experts.slot_loader import CudaSlotLoader, open_slot_loader
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.weights.checkpoint_layouts import checkpoint_layout_of
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights
from gpu_worker.cuda.weights.scaled_blocks import multiplies_fp8
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.expert_cache_memory import ExpertCacheMemory
from shared.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class CudaModel:
    """A loaded model. `slots` are empty until `loader` fills them. `copies` is done when the host's
    copies of experts are pinned."""

    sizes: DecoderSizes
    weights: DecoderWeights
    slots: CudaSlots
    copies: Future[HostExperts]
    open_loader: Callable[[HostExperts], CudaSlotLoader]

    @cached_property
    def loader(self) -> CudaSlotLoader:
        """Waits for the copies."""
        return self.open_loader(self.host_experts)

    @property
    def host_experts(self) -> HostExperts:
        """Waits for them."""
        return self.copies.result()


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
    """Reads the shared weights and allocates the slots. Copies of experts go into `cache_memory`,
    which a thread pins meanwhile, and still does when this returns: no step may run before
    `CudaModel.loader` is there. Raises CheckpointError; if the architecture or the files are wrong,
    before it reads anything."""
    layout = checkpoint_layout_of(spec)
    checkpoint = open_checkpoint(folder, layout.tensor_shapes(), progress.count)
    prefixes = (
        layout.expert_prefix(layer, expert)
        for layer in range(spec.num_moe_layers)
        for expert in range(spec.num_experts)
    )
    scaled = multiplies_fp8(device) and are_scaled(checkpoint, prefixes)
    reader = ExpertReader(checkpoint, layout.expert_prefix, dtype, scaled=scaled)
    header = expert_cache_header(checkpoint, reader, spec)
    opener = ThreadPoolExecutor(1, "host-experts")
    copies = opener.submit(open_host_experts, reader, cache_memory, header, device)
    opener.shutdown(wait=False)
    weights = layout.read(WeightReader(checkpoint, device, dtype))
    slots = CudaSlots(
        num_layers=spec.num_moe_layers,
        slots_per_rank=slots_per_rank,
        hidden_size=spec.hidden_size,
        inner_size=spec.moe_intermediate_size,
        device=device,
        dtype=dtype,
        scaled=scaled,
    )

    def open_loader(host_experts: HostExperts) -> CudaSlotLoader:
        return open_slot_loader(
            slots=slots,
            reader=reader,
            host_experts=host_experts,
            progress=progress,
            device=device,
        )

    return CudaModel(
        sizes=layout.sizes,
        weights=weights,
        slots=slots,
        copies=copies,
        open_loader=open_loader,
    )


def expert_cache_header(
    checkpoint: Checkpoint, reader: ExpertReader, spec: ModelSpec
) -> ExpertCacheHeader:
    return ExpertCacheHeader(
        folder=str(checkpoint.folder),
        fingerprint=checkpoint.fingerprint(),
        dtype=str(reader.dtype),
        num_values=reader.num_values,
        num_layers=spec.num_moe_layers,
        num_experts=spec.num_experts,
    )
