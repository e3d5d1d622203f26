"""The interface between a model family and the decoder. One file for each architecture implements
`Family`, with layers from `attention_*`, `routers` and `mlp`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.cpu.expert_slots import MlpSlot
from gpu_worker.cpu.kernels.warm_up import EntryPoint
from gpu_worker.cpu.mlp import DenseWeights
from gpu_worker.engine.step_batch import StepBatch
from shared.model_spec import ModelSpec

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """The rank's KV cache: `num_blocks` blocks of `block_tokens` tokens, in every layer."""

    num_blocks: int
    block_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens


class Attention(Protocol):
    """The attention half of one layer, with its norm, weights and KV cache."""

    def attend(self, x_TH: Floats, batch: StepBatch) -> None:
        """x += attention(norm(x)) for the step's tokens. Writes their KV first. Rows of `x_TH`
        after the step's tokens do not change."""
        ...

    def cache_arrays(self) -> Sequence[Floats]:
        """The KV cache; the first axis of each is the block."""
        ...


class Router(Protocol):
    """Chooses experts."""

    def route(
        self,
        h_TH: Floats,
        experts_TK: NDArray[np.int32],
        weights_TK: Floats,
        num_tokens: int,
    ) -> None:
        """Fills `experts_TK` and `weights_TK` for the first `num_tokens` rows of the normed
        `h_TH`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """x += sum of weights * experts(norm(x)) + shared(norm(x)). Every rank has `shared` and
    computes it for its own tokens."""

    norm_H: Floats
    router: Router
    shared: DenseWeights | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer:
    """x += mlp(norm(x))."""

    norm_H: Floats
    mlp: DenseWeights


class Family(Protocol):
    """One architecture, for one config.json.

    `layer` is one of `ModelSpec.layers`; `ModelSpec.moe_layers` says which have experts. Experts
    are read whenever a slot is loaded, by another thread. Everything else is read once, when the
    rank starts.
    """

    entry_points: ClassVar[Sequence[EntryPoint]]
    """The kernels of the family's attention and routers."""

    expert_activation: ClassVar[int]
    norm_eps: float
    embedding_name: str
    final_norm_name: str
    head_name: str

    def __init__(self, spec: ModelSpec) -> None:
        """Raises CheckpointError if the config is malformed or asks for something unsupported."""
        ...

    def tensor_shapes(self) -> dict[str, Shape]:
        """The shape of every tensor of a complete checkpoint, by its name in the checkpoint, except
        those of `checkpoint.draft_tensors`."""
        ...

    def read_attention(
        self, checkpoint: Checkpoint, kv: KvShape, context_tokens_max: int
    ) -> list[Attention]:
        """One for each layer. They may share scratch memory, because they run one after the other.
        Positions are below `context_tokens_max`."""
        ...

    def read_mlp(self, checkpoint: Checkpoint, layer: int) -> MoeLayer | DenseLayer: ...

    def read_expert(
        self, checkpoint: Checkpoint, layer: int, expert: int, slot: MlpSlot
    ) -> None: ...
