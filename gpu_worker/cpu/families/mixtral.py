"""Mixtral: plain grouped-query attention, with a sliding window in some checkpoints."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.checkpoint.mlp_names import MlpNames
from gpu_worker.cpu.gqa_family import GqaFamily
from shared.model_spec import ModelSpec


class Mixtral(GqaFamily):
    mlp_name = "block_sparse_moe"
    expert_names = MlpNames(gate="w1", up="w3", down="w2")

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.shape = replace(self.shape, window=int(spec.raw.get("sliding_window") or 0))
        self.qkv_bias = self.o_bias = False
        self.norm_eps = float(spec.raw.get("rms_norm_eps", 1e-5))

    def normalises_weights(self) -> bool:
        return True


FAMILY = Mixtral
