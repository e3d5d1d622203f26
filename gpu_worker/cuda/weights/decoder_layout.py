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

_Weights_co = TypeVar("_Weights_co", covariant=True)


class LayerPart(Protocol[_Weights_co]):
    """The attention of each layer, or its MLP with or without experts."""

    def tensor_shapes(self, layer: int) -> dict[str, Shape]: ...

    def read(self, reader: WeightReader, layer: int) -> _Weights_co:
        """Raises CheckpointError."""
        ...


class MlpPart(LayerPart[MoeWeights | MlpWeights], Protocol):
    @property
    def expert_prefixes(self) -> frozenset[str]:
        """What the names of experts' tensors begin with, without the last one or two words."""
        ...

    def open_experts(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> ExpertSource:
        """For slots on `device`: in a form that its kernels take."""
        ...


class DecoderLayout:
    """Implements `checkpoint_layouts.CheckpointLayout`."""

    def __init__(
        self,
        spec: ModelSpec,
        sizes: DecoderSizes,
        *,
        attention: LayerPart[GqaWeights | MlaWeights],
        mlps: MlpPart,
    ) -> None:
        self.sizes = sizes
        self.expert_prefixes = mlps.expert_prefixes
        self.open_experts = mlps.open_experts
        self._spec = spec
        self._attention = attention
        self._mlps = mlps

    def tensor_shapes(self) -> dict[str, Shape]:
        shapes = common_tensor_shapes(self._spec)
        for layer in range(self._spec.num_layers):
            shapes |= self._attention.tensor_shapes(layer)
            shapes |= self._mlps.tensor_shapes(layer)
        return shapes

    def read(self, reader: WeightReader) -> DecoderWeights:
        return read_decoder(
            reader,
            self._spec,
            lambda layer: read_layer(
                reader, layer, self._attention.read(reader, layer), self._mlps.read(reader, layer)
            ),
        )
