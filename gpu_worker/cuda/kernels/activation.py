"""What the expert kernels do with their sums before they store them: biases, and the activation
between gate and up. These are pieces of other kernels; what a model lacks is compiled away."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.checkpoint.gpt_oss_config import SWIGLU_ALPHA, SWIGLU_LIMIT

_ALPHA, _LIMIT = tl.constexpr(SWIGLU_ALPHA), tl.constexpr(SWIGLU_LIMIT)


class Epilogue(NamedTuple):
    """`clamped` experts have gpt-oss's activation in place of `silu(gate) · up`. The biases are by
    slot: `b_gate_up_SJ` of gate, then up, and `b_down_SH`."""

    clamped: bool = False
    b_gate_up_SJ: torch.Tensor | None = None
    b_down_SH: torch.Tensor | None = None


SILU_GATED = Epilogue()


@triton.jit
def with_bias(sums, bias_ptr, n, BIASED: tl.constexpr):
    """Adds the bias of each column. By this instruction, because the compiler would begin a product
    of one step with a plain summand, which has other bits."""
    if BIASED:
        bias = tl.load(bias_ptr + n).to(tl.float32)
        ones = tl.full(sums.shape, 1.0, tl.float32)
        sums = tl.fma(sums, ones, tl.broadcast_to(bias[None, :], sums.shape))
    return sums


@triton.jit
def gated(gate, up, bias_ptr, n, INNER: tl.constexpr, BIASED: tl.constexpr, CLAMPED: tl.constexpr):
    """The inner values of the columns `n`. `bias_ptr` is the slot's."""
    gate = with_bias(gate, bias_ptr, n, BIASED)
    up = with_bias(up, bias_ptr + INNER, n, BIASED)
    if CLAMPED:
        gate = tl.minimum(gate, _LIMIT)
        up = tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT)
        inner = gate / (1.0 + tl.exp(-_ALPHA * gate)) * (up + 1.0)
    else:
        inner = gate / (1.0 + tl.exp(-gate)) * up
    return inner
