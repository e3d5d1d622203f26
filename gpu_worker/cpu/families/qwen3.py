"""Qwen3, dense: ranks exchange nothing, and a death only moves sessions."""

from __future__ import annotations

from gpu_worker.checkpoint.common_tensors import raise_if_unsupported, read_layer_types
from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD
from gpu_worker.cpu.gqa_family import GqaFamily
from shared.model_spec import ModelSpec


class Qwen3(GqaFamily):
    qk_norm = QK_NORM_HEAD

    def __init__(self, spec: ModelSpec) -> None:
        windowed = bool(spec.raw.get("use_sliding_window", False))
        raise_if_unsupported(spec, {"sliding-window attention (use_sliding_window)": windowed})
        read_layer_types(spec, ("full_attention",))
        super().__init__(spec)


FAMILY = Qwen3
