"""Weights in the panel layout of the CPU kernels, made from a plain matrix."""

from __future__ import annotations

from gpu_worker.cpu.kernels.tiles import pack
from gpu_worker.cpu.weights import Weights, empty_panels


def into_panels(w_KN: Weights) -> Weights:
    """`[inputs, outputs]`, float32 or bfloat16 as uint16, in panels of the same dtype."""
    panels: Weights = empty_panels((), w_KN.shape[0], w_KN.shape[1], w_KN.dtype)
    pack(w_KN, panels)
    return panels
