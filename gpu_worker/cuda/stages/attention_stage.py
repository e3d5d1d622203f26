"""What the decoder asks of attention; `gqa_stage` and `mla_stage` answer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from gpu_worker.cuda.kernels.paging import Paging


class AttentionStage(Protocol):
    """All layers' attention, with their KV cache and what a step needs on the way."""

    def run(self, layer: int, h_TH: Tensor, paging: Paging) -> Tensor:
        """From the normed stream to the heads' values side by side, `[T, O]`; writes the rows' own
        keys and values to the cache first."""
        ...

    def cache(self) -> tuple[Tensor, ...]:
        """Of all layers: axis 0 is the layer, axis 1 the block."""
        ...
