"""The interface of attention for the decoder. `gqa_stage` and `mla_stage` implement it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gpu_worker.cuda.kernels.paging import Paging


class AttentionStage(Protocol):
    """All layers' attention, with their KV cache and the buffers of a step."""

    def run(self, layer: int, h_TH: Tensor, paging: Paging) -> Tensor:
        """Writes the rows' own keys and values to the cache, then attends. `h_TH` is the normed
        stream; the result is the heads' values side by side, `[T, O]`."""
        ...

    def cache(self) -> tuple[Tensor, ...]:
        """The cache tensors of all layers: axis 0 is the layer, axis 1 the block."""
        ...
