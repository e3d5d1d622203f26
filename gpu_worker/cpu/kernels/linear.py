"""Matrix products, norms and sums over rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_worker.cpu.kernels.arithmetic import ONE, ZERO, exp32, fma, kernel
from gpu_worker.cpu.kernels.tiles import LANES, PANEL, ROWS_MAX, ROWS_MAX_WIDE, accumulate_tile
from gpu_worker.cpu.kernels.warm_up import (
    FLOAT,
    FLOATS_1D,
    FLOATS_2D,
    INT,
    PANELS,
    READONLY_INTS_1D,
    EntryPoint,
)

_VECTORS = 4
"""Vectors in the width of a tile: enough independent chains to hide the latency of an addition."""


@kernel
def accumulate_row(a: Any, w: Any, out: Any, n0: int, n1: int) -> None:
    """out[n0:n1] += a @ w[:, n0:n1] for one row."""
    num_inputs = a.shape[0]
    o = out[n0:n1]
    k = 0
    while k + 8 <= num_inputs:
        w0, w1, w2, w3 = w[k, n0:n1], w[k + 1, n0:n1], w[k + 2, n0:n1], w[k + 3, n0:n1]
        w4, w5, w6, w7 = w[k + 4, n0:n1], w[k + 5, n0:n1], w[k + 6, n0:n1], w[k + 7, n0:n1]
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        a4, a5, a6, a7 = a[k + 4], a[k + 5], a[k + 6], a[k + 7]
        for n in range(n1 - n0):
            s = fma(a3, w3[n], fma(a2, w2[n], fma(a1, w1[n], fma(a0, w0[n], o[n]))))
            o[n] = fma(a7, w7[n], fma(a6, w6[n], fma(a5, w5[n], fma(a4, w4[n], s))))
        k += 8
    while k < num_inputs:
        w0 = w[k, n0:n1]
        a0 = a[k]
        for n in range(n1 - n0):
            o[n] = fma(a0, w0[n], o[n])
        k += 1


@kernel
def accumulate_block(
    x: Any, k: int, w_BKN: Any, block: int, first: int, depth: int, out: Any, n: int, num_rows: int
) -> None:
    """out[:, n:] += x[:, k:] @ w[block, first : first + depth] for the first `num_rows` rows."""
    width = w_BKN.shape[2]
    start = first * width
    groups = (num_rows + ROWS_MAX_WIDE - 1) // ROWS_MAX_WIDE
    c = 0
    while c + LANES <= width:
        is_wide = c + _VECTORS * LANES <= width
        for g in range(groups):
            m = g * num_rows // groups
            rows = (g + 1) * num_rows // groups - m
            if is_wide:
                accumulate_tile(
                    rows, _VECTORS, x, m, k, w_BKN, (block,), start + c, depth, out, n + c
                )
            else:
                accumulate_tile(rows, 1, x, m, k, w_BKN, (block,), start + c, depth, out, n + c)
        c += _VECTORS * LANES if is_wide else LANES
    if c < width:
        w_KN = w_BKN[block, first : first + depth]
        for m in range(num_rows):
            accumulate_row(x[m, k : k + depth], w_KN, out[m, n : n + width], c, width)


@kernel
def accumulate(x: Any, w_KN: Any, out: Any, num_rows: int) -> None:
    """out += x @ w for the first `num_rows` rows, in the columns that w has."""
    depth, width = w_KN.shape
    accumulate_block(x, 0, w_KN.reshape(1, depth, width), 0, 0, depth, out, 0, num_rows)


@kernel
def _accumulate_panels(x_MK: Any, w: Any, out_MN: Any, num_rows: int) -> None:
    """Splits the rows into groups of nearly equal size; each group reads a panel once."""
    depth, width = w.shape[1], out_MN.shape[1]
    groups = (num_rows + ROWS_MAX - 1) // ROWS_MAX
    panels = width // PANEL
    for p in range(panels):
        for g in range(groups):
            m = g * num_rows // groups
            rows = (g + 1) * num_rows // groups - m
            accumulate_tile(rows, 2, x_MK, m, 0, w, (p,), 0, depth, out_MN, p * PANEL)
    if panels * PANEL < width:
        _accumulate_part(x_MK, w, panels, out_MN, num_rows)


@kernel
def _accumulate_part(x_MK: Any, w: Any, p: int, out_MN: Any, num_rows: int) -> None:
    """The last panel, if `out` ends inside it."""
    n = p * PANEL
    size = out_MN.shape[1] - n
    whole_MP = np.zeros((num_rows, PANEL), dtype=np.float32)
    whole_MP[:, :size] = out_MN[:num_rows, n:]
    for m in range(num_rows):
        accumulate_tile(1, 2, x_MK, m, 0, w, (p,), 0, w.shape[1], whole_MP, 0)
    out_MN[:num_rows, n:] = whole_MP[:, :size]


@kernel
def linear(x_MK: Any, w: Any, bias_N: Any, out_MN: Any, num_rows: int) -> None:
    """out = bias + x @ w for the first `num_rows` rows. w is `[inputs, outputs]` or in panels."""
    for m in range(num_rows):
        out_MN[m, :] = bias_N
    if w.ndim == 3:
        _accumulate_panels(x_MK, w, out_MN, num_rows)
    else:
        accumulate(x_MK, w, out_MN, num_rows)


@kernel
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """Root-mean-square norm of one vector, in four interleaved sums. `out` may be `x`."""
    size = x.shape[0]
    s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
    i = 0
    while i + 4 <= size:
        s0 = fma(x[i], x[i], s0)
        s1 = fma(x[i + 1], x[i + 1], s1)
        s2 = fma(x[i + 2], x[i + 2], s2)
        s3 = fma(x[i + 3], x[i + 3], s3)
        i += 4
    while i < size:
        s0 = fma(x[i], x[i], s0)
        i += 1
    scale = ONE / np.sqrt(((s0 + s1) + (s2 + s3)) / np.float32(size) + eps)
    for i in range(size):
        out[i] = (x[i] * scale) * weight[i]


@kernel
def norm_rows(x_TH: Any, weight_H: Any, eps: Any, out_TH: Any, num_rows: int) -> None:
    for t in range(num_rows):
        rms_norm(x_TH[t], weight_H, eps, out_TH[t])


@kernel
def add_rows(x_TH: Any, y_TH: Any, num_rows: int) -> None:
    """x += y for the first `num_rows` rows."""
    for t in range(num_rows):
        for i in range(x_TH.shape[1]):
            x_TH[t, i] += y_TH[t, i]


@kernel
def _largest(x: Any, size: int) -> Any:
    """The maximum, in eight independent chains: its order does not matter, and one chain alone
    would wait for the latency of each step."""
    m0 = m1 = m2 = m3 = m4 = m5 = m6 = m7 = x[0]
    i = 0
    while i + 8 <= size:
        m0, m1, m2, m3 = max(m0, x[i]), max(m1, x[i + 1]), max(m2, x[i + 2]), max(m3, x[i + 3])
        m4, m5 = max(m4, x[i + 4]), max(m5, x[i + 5])
        m6, m7 = max(m6, x[i + 6]), max(m7, x[i + 7])
        i += 8
    while i < size:
        m0 = max(m0, x[i])
        i += 1
    return max(max(max(m0, m1), max(m2, m3)), max(max(m4, m5), max(m6, m7)))


@kernel
def softmax(scores: Any, scale: Any, size: int) -> Any:
    """Replaces the first `size` scores with exp(scale * (score - max)); returns their sum."""
    top = _largest(scores, size)
    for i in range(size):
        scores[i] = exp32((scores[i] - top) * scale)
    s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
    i = 0
    while i + 4 <= size:
        s0 += scores[i]
        s1 += scores[i + 1]
        s2 += scores[i + 2]
        s3 += scores[i + 3]
        i += 4
    while i < size:
        s0 += scores[i]
        i += 1
    return (s0 + s1) + (s2 + s3)


@kernel
def head_logits(
    x_TH: Any, rows_R: Any, norm_H: Any, w_head: Any, zeros: Any, eps: Any, h_TH: Any, out_RV: Any
) -> None:
    """Logits of the rows `rows_R`. `h_TH` is scratch."""
    for r in range(rows_R.shape[0]):
        rms_norm(x_TH[rows_R[r]], norm_H, eps, h_TH[r])
    linear(h_TH, w_head, zeros, out_RV, rows_R.shape[0])


ENTRY_POINTS: list[EntryPoint] = [
    (norm_rows, (FLOATS_2D, FLOATS_1D, FLOAT, FLOATS_2D, INT)),
    (add_rows, (FLOATS_2D, FLOATS_2D, INT)),
    (
        head_logits,
        (FLOATS_2D, READONLY_INTS_1D, FLOATS_1D, PANELS, FLOATS_1D, FLOAT, FLOATS_2D, FLOATS_2D),
    ),
]
