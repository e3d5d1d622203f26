"""Loads a model from a checkpoint folder: finds the family that serves its architecture, and
compiles the kernels of that family. `shared.model_spec` lists which file serves which
architecture."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from gpu_worker.checkpoint.checkpoint import OnRead, open_checkpoint
from gpu_worker.cpu.decoder import Decoder
from gpu_worker.cpu.family import Family, KvShape
from gpu_worker.cpu.kernels import draft, experts, linear
from gpu_worker.cpu.kernels.warm_up import EntryPoint, compile_all
from gpu_worker.cpu.weights import weights_dtype
from gpu_worker.exchange import traffic
from shared.model_spec import ARCHITECTURES, ModelSpec, read_model_spec, with_drafts

COMMON_KERNELS: tuple[EntryPoint, ...] = (*linear.ENTRY_POINTS, *experts.ENTRY_POINTS)


def load_model(
    folder: Path,
    *,
    slots_per_rank: int,
    kv_blocks: int,
    block_tokens: int,
    speculative_tokens: int = 0,
    on_warm_up: Callable[[int, int], None] | None = None,
    on_read: OnRead | None = None,
) -> Decoder:
    """A model that can step as soon as its expert slots are loaded: its kernels are compiled and
    its other weights are read. The checkpoint is checked before the kernels are compiled. Raises
    CheckpointError."""
    spec = with_drafts(read_model_spec(folder), speculative_tokens)
    family = family_class(spec.architecture)(spec)
    model = Decoder(
        folder=folder,
        spec=spec,
        family=family,
        slots_per_rank=slots_per_rank,
        kv=KvShape(num_blocks=kv_blocks, block_tokens=block_tokens),
        on_read=on_read,
    )
    wanted = [*COMMON_KERNELS, *family.entry_points]
    if spec.draft_layers:
        wanted += draft.ENTRY_POINTS
    compile_all(wanted, on_warm_up, [model.weights_dtype])
    return model


def load_kernels(
    folder: Path, spec: ModelSpec, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Compiles or loads all that a rank with this checkpoint runs. Raises CheckpointError."""
    family = family_class(spec.architecture)(spec)
    dtype = weights_dtype(open_checkpoint(folder, family.tensor_shapes()))
    compile_all([*COMMON_KERNELS, *family.entry_points], on_progress, [dtype])
    traffic.compile_all(spec.hidden_size, spec.top_k)


def warm_up(on_progress: Callable[[int, int], None] | None = None) -> None:
    """Fills numba's cache with the kernels of every family, and with the exchange's."""
    traffic.compile_all(hidden_size=1, top_k=1)
    wanted = [*COMMON_KERNELS, *draft.ENTRY_POINTS]
    for architecture in ARCHITECTURES:
        wanted += family_class(architecture).entry_points
    unique = {(id(kernel), signature): (kernel, signature) for kernel, signature in wanted}
    compile_all(list(unique.values()), on_progress)


def family_class(architecture: str) -> type[Family]:
    """The class `FAMILY` in the file that serves this architecture."""
    module = importlib.import_module(f"gpu_worker.cpu.families.{ARCHITECTURES[architecture]}")
    family: type[Family] = module.FAMILY
    return family
