"""gpt-oss: attention sinks, a sliding window in some layers, experts with biases and a clamped
activation. The experts of a layer are stored together (as published, in MXFP4)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpu_worker.checkpoint.checkpoint import Checkpoint, Shape
from gpu_worker.checkpoint.common_tensors import raise_if_unsupported, read_layer_types
from gpu_worker.checkpoint.gqa_shape import GqaShape
from gpu_worker.cpu.expert_slots import MlpSlot
from gpu_worker.cpu.family import Router
from gpu_worker.cpu.gqa_family import GqaFamily
from gpu_worker.cpu.kernels import experts
from gpu_worker.cpu.routers import TopKSoftmaxRouter
from gpu_worker.cpu.weights import read_matrix, read_vector, read_weight_part
from shared.model_spec import ModelSpec

_ALPHA, _LIMIT = 1.702, 7.0
_SLIDING, _FULL = "sliding_attention", "full_attention"


class GptOss(GqaFamily):
    expert_activation = experts.CLAMPED_SWIGLU
    has_sinks = True
    router_name = "router"

    def __init__(self, spec: ModelSpec) -> None:
        raw = spec.raw
        alpha, limit = raw.get("swiglu_alpha", _ALPHA), raw.get("swiglu_limit", _LIMIT)
        raise_if_unsupported(
            spec, {f"a SwiGLU of {alpha} and {limit}": (alpha, limit) != (_ALPHA, _LIMIT)}
        )
        super().__init__(spec)
        self.qkv_bias = self.o_bias = bool(raw.get("attention_bias", True))
        self.norm_eps = float(raw.get("rms_norm_eps", 1e-5))
        kinds = read_layer_types(spec, (_SLIDING, _FULL)) or [
            _FULL if layer % 2 else _SLIDING for layer in range(spec.num_layers)
        ]
        window = int(raw.get("sliding_window") or 0)
        self._windows = [window if kind == _SLIDING else 0 for kind in kinds]

    def shape_of(self, layer: int) -> GqaShape:
        return replace(self.shape, window=self._windows[layer])

    def moe_shapes(self, layer: int) -> dict[str, Shape]:
        spec, prefix = self.spec, self.mlp_prefix(layer)
        num_experts, inner_size = spec.num_experts, spec.moe_intermediate_size
        return {
            f"{prefix}.router.weight": (num_experts, spec.hidden_size),
            f"{prefix}.router.bias": (num_experts,),
            f"{prefix}.experts.gate_up_proj": (num_experts, spec.hidden_size, 2 * inner_size),
            f"{prefix}.experts.gate_up_proj_bias": (num_experts, 2 * inner_size),
            f"{prefix}.experts.down_proj": (num_experts, inner_size, spec.hidden_size),
            f"{prefix}.experts.down_proj_bias": (num_experts, spec.hidden_size),
        }

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
