"""The experts of a rank over its (row, slot) pairs, and their weighted sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_worker.cpu.kernels.arithmetic import ONE, ZERO, exp32, fma, kernel
from gpu_worker.cpu.kernels.linear import linear
from gpu_worker.cpu.kernels.warm_up import (
    FLOATS_2D,
    INT,
    INTS_1D,
    PANELS_OF_SLOTS,
    READONLY_FLOATS_2D,
    READONLY_FLOATS_3D,
    READONLY_INTS_1D,
    EntryPoint,
)

SWIGLU = 0
CLAMPED_SWIGLU = 1

_CLAMP = np.float32(7.0)
_ALPHA = np.float32(1.702)


@kernel
def _order_by_slot(slots_N: Any, order_N: Any, ends_S: Any) -> None:
    """A stable counting sort: the pairs of slot s are order[ends[s-1]:ends[s]]."""
    ends_S[:] = 0
    for n in range(slots_N.shape[0]):
        ends_S[slots_N[n]] += 1
    total = 0
    for s in range(ends_S.shape[0]):
        total, ends_S[s] = total + ends_S[s], total
    for n in range(slots_N.shape[0]):
        s = slots_N[n]
        order_N[ends_S[s]] = n
        ends_S[s] += 1


@kernel
def _gate(gate_up: Any, out: Any) -> None:
    """out = silu(gate) * up for one row."""
    size = out.shape[0]
    gate, up = gate_up[:size], gate_up[size:]
    for i in range(size):
        out[i] = (gate[i] / (ONE + exp32(-gate[i]))) * up[i]


@kernel
def _gate_clamped(gate_up: Any, out: Any) -> None:
    """gpt-oss: out = g * sigmoid(1.702 g) * (u + 1), with g clamped above and u on both sides."""
    size = out.shape[0]
    gate, up = gate_up[:size], gate_up[size:]
    for i in range(size):
        g = min(gate[i], _CLAMP)
        u = max(min(up[i], _CLAMP), -_CLAMP)
        out[i] = (u + ONE) * (g / (ONE + exp32(-_ALPHA * g)))


@kernel
def run_experts(
    x_MH: Any, rows_N: Any, slots_N: Any, w_gate_up: Any, w_down: Any, b_gate_up: Any, b_down: Any,
    activation: int, y_NH: Any, order_N: Any, ends_S: Any, x_NH: Any, gate_up_NJ: Any,
    inner_NI: Any, out_NH: Any,
) -> None:  # fmt: skip
    """y[n] = the expert in slot slots[n], applied to x[rows[n]]. A slot's weights are panels of
    `[H, 2I]` and `[I, H]`; biases are `[S, 2I]` and `[S, H]`. Each slot's weights are read from
    memory once per call. Every argument after `y_NH` is scratch."""
    _order_by_slot(slots_N, order_N, ends_S)
    first = 0
    for s in range(ends_S.shape[0]):
        size = ends_S[s] - first
        for i in range(size):
            x_NH[i, :] = x_MH[rows_N[order_N[first + i]]]
        linear(x_NH, w_gate_up[s], b_gate_up[s], gate_up_NJ, size)
        for i in range(size):
            if activation == CLAMPED_SWIGLU:
                _gate_clamped(gate_up_NJ[i], inner_NI[i])
            else:
                _gate(gate_up_NJ[i], inner_NI[i])
        linear(inner_NI, w_down[s], b_down[s], out_NH, size)
        for i in range(size):
            y_NH[order_N[first + i], :] = out_NH[i]
        first = ends_S[s]


@kernel
def add_weighted(x_TH: Any, y_TKH: Any, weights_TK: Any, num_tokens: int) -> None:
    """x[t] += sum over k, in order, of weights[t, k] * y[t, k]."""
    for t in range(num_tokens):
        for i in range(x_TH.shape[1]):
            total = ZERO
            for k in range(weights_TK.shape[1]):
                total = fma(weights_TK[t, k], y_TKH[t, k, i], total)
            x_TH[t, i] += total


ENTRY_POINTS: list[EntryPoint] = [
    (
        run_experts,
        (
            READONLY_FLOATS_2D, READONLY_INTS_1D, READONLY_INTS_1D, PANELS_OF_SLOTS,
            PANELS_OF_SLOTS, FLOATS_2D, FLOATS_2D, INT, FLOATS_2D, INTS_1D, INTS_1D, FLOATS_2D,
            FLOATS_2D, FLOATS_2D, FLOATS_2D,
        ),
    ),
    (add_weighted, (FLOATS_2D, READONLY_FLOATS_3D, FLOATS_2D, INT)),
]  # fmt: skip
