"""OLMoE: one norm over the queries of all heads and one over their keys; values may be clipped."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.checkpoint.gqa_shape import QK_NORM_WHOLE
from gpu_worker.cpu.gqa_family import GqaFamily
from shared.model_spec import ModelSpec


class Olmoe(GqaFamily):
    qk_norm = QK_NORM_WHOLE

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.shape = replace(self.shape, clip=float(spec.raw.get("clip_qkv") or 0.0))
        self.norm_eps = float(spec.raw.get("rms_norm_eps", 1e-5))


FAMILY = Olmoe
