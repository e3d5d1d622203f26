"""The checkpoint of any decoder, put together of two parts per layer: attention, and what comes
after it. A family's file says which, and reads what its config says about them."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.common_tensors import common_tensor_shapes
from gpu_worker.cuda.experts.expert_reader import ExpertSource
from gpu_worker.cuda.weights.common_weights import read_decoder, read_layer
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import (
    DecoderWeights,
    GqaWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from gpu_worker.cuda.weights.weight_reader import WeightReader
from shared.model_spec import ModelSpec

_OF_EXPERTS = ".experts."
_Weights_co = TypeVar("_Weights_co", covariant=True)


class LayerPart(Protocol[_Weights_co]):
    """The attention of each layer, or its MLP with or without experts."""

    def tensor_shapes(self, layer: int) -> dict[str, Shape]: ...

    def read(self, reader: WeightReader, layer: int) -> _Weights_co:
        """Raises CheckpointError."""
        ...


class OpenExperts(Protocol):
    def __call__(self, checkpoint: Checkpoint, dtype: torch.dtype, *, scaled: bool) -> ExpertSource:
        """`scaled`: the tensors of all experts are in block-scaled FP8, and may stay so."""
        ...


class DecoderLayout:
    """Implements `checkpoint_layouts.CheckpointLayout`."""

    def __init__(
        self,
        spec: ModelSpec,
        sizes: DecoderSizes,
        *,
        attention: LayerPart[GqaWeights | MlaWeights],
        mlps: LayerPart[MoeWeights | MlpWeights],
        open_experts: OpenExperts,
    ) -> None:
        self.sizes = sizes
        self.open_experts = open_experts
        self._spec = spec
        self._attention = attention
        self._mlps = mlps

    def tensor_shapes(self) -> dict[str, Shape]:
        shapes = common_tensor_shapes(self._spec)
        for layer in range(self._spec.num_layers):
            shapes |= self._attention.tensor_shapes(layer)
            shapes |= self._mlps.tensor_shapes(layer)
        return shapes

    def expert_tensors(self) -> set[str]:
        return {name for name in self.tensor_shapes() if _OF_EXPERTS in name}

    def read(self, reader: WeightReader) -> DecoderWeights:
        return read_decoder(
            reader,
            self._spec,
            lambda layer: read_layer(
                reader, layer, self._attention.read(reader, layer), self._mlps.read(reader, layer)
            ),
        )
