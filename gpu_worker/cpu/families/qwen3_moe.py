"""Qwen3-MoE: a norm on every head's queries and keys, softmax routing, no shared expert."""

from __future__ import annotations

from gpu_worker.checkpoint.common_tensors import raise_if_unsupported
from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD
from gpu_worker.cpu.gqa_family import GqaFamily
from shared.model_spec import ModelSpec


class Qwen3Moe(GqaFamily):
    qk_norm = QK_NORM_HEAD

    def __init__(self, spec: ModelSpec) -> None:
        raise_if_unsupported(
            spec,
            {
                "sliding-window attention (use_sliding_window)": bool(
                    spec.raw.get("use_sliding_window", False)
                ),
                "a model without expert layers": not spec.moe_layers,
            },
        )
        super().__init__(spec)


FAMILY = Qwen3Moe
