"""gpt-oss: attention sinks, a sliding window in some layers, experts with biases and a clamped
activation. The experts of a layer are stored together (as published, in MXFP4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.gpt_oss_config import gpt_oss_moe_shapes, read_gpt_oss_windows
from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.cpu.expert_slots import MlpSlot
from gpu_worker.cpu.family import Router
from gpu_worker.cpu.gqa_family import GqaFamily
from gpu_worker.cpu.kernels import experts
from gpu_worker.cpu.routers import TopKSoftmaxRouter
from gpu_worker.cpu.weights import read_matrix, read_vector, read_weight_part
from shared.model_spec import ModelSpec


class GptOss(GqaFamily):
    expert_activation = experts.CLAMPED_SWIGLU
    has_sinks = True
    router_name = "router"

    def __init__(self, spec: ModelSpec) -> None:
        raw = spec.raw
        super().__init__(spec)
        self.qkv_bias = self.o_bias = bool(raw.get("attention_bias", True))
        self.norm_eps = float(raw.get("rms_norm_eps", 1e-5))
        self._windows = read_gpt_oss_windows(spec)

    def shape_of(self, layer: int) -> GqaShape:
        return replace(self.shape, window=self._windows[layer])

    def moe_shapes(self, layer: int) -> dict[str, Shape]:
        return gpt_oss_moe_shapes(self.spec, self.mlp_prefix(layer))

    def read_router(self, checkpoint: Checkpoint, layer: int) -> Router:
        prefix = f"{self.mlp_prefix(layer)}.router"
        return TopKSoftmaxRouter(
            read_matrix(checkpoint, f"{prefix}.weight"), read_vector(checkpoint, f"{prefix}.bias")
        )

    def read_expert(self, checkpoint: Checkpoint, layer: int, expert: int, slot: MlpSlot) -> None:
        """Gate and up are interleaved: column 2i is gate i, column 2i + 1 is up i."""
        prefix = f"{self.mlp_prefix(layer)}.experts"
        gate_up_HJ = read_weight_part(checkpoint, f"{prefix}.gate_up_proj", expert)
        slot.put_gate(gate_up_HJ[:, ::2].T)
        slot.put_up(gate_up_HJ[:, 1::2].T)
        del gate_up_HJ
        slot.put_down(read_weight_part(checkpoint, f"{prefix}.down_proj", expert).T)
        bias_J = checkpoint.read_part(f"{prefix}.gate_up_proj_bias", expert)
        slot.b_gate_up_J[:] = np.concatenate([bias_J[::2], bias_J[1::2]])
        slot.b_down_H[:] = checkpoint.read_part(f"{prefix}.down_proj_bias", expert)


FAMILY = GptOss
