"""Matrix products, norms and sums over rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_worker.model.kernels.arithmetic import ONE, ZERO, exp32, fma, kernel
from gpu_worker.model.kernels.tiles import PANEL, ROWS_MAX, advance_tile
from gpu_worker.model.kernels.warm_up import (
    FLOAT,
    FLOATS_1D,
    FLOATS_2D,
    GIVEN_INTS_1D,
    INT,
    PANELS,
    EntryPoint,
)

_COLUMNS_PER_PASS = 1024
"""Wide outputs are made in passes so that four rows of a pass stay in the L1 cache."""


@kernel
def _advance_4_rows(x: Any, w: Any, out: Any, m: int, n0: int, n1: int) -> None:
    num_inputs = x.shape[1]
    o0, o1, o2, o3 = out[m, n0:n1], out[m + 1, n0:n1], out[m + 2, n0:n1], out[m + 3, n0:n1]
    a, b, c, d = x[m], x[m + 1], x[m + 2], x[m + 3]
    k = 0
    while k + 4 <= num_inputs:
        w0, w1, w2, w3 = w[k, n0:n1], w[k + 1, n0:n1], w[k + 2, n0:n1], w[k + 3, n0:n1]
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        c0, c1, c2, c3 = c[k], c[k + 1], c[k + 2], c[k + 3]
        d0, d1, d2, d3 = d[k], d[k + 1], d[k + 2], d[k + 3]
        for n in range(n1 - n0):
            p0, p1, p2, p3 = w0[n], w1[n], w2[n], w3[n]
            o0[n] = fma(a3, p3, fma(a2, p2, fma(a1, p1, fma(a0, p0, o0[n]))))
            o1[n] = fma(b3, p3, fma(b2, p2, fma(b1, p1, fma(b0, p0, o1[n]))))
            o2[n] = fma(c3, p3, fma(c2, p2, fma(c1, p1, fma(c0, p0, o2[n]))))
            o3[n] = fma(d3, p3, fma(d2, p2, fma(d1, p1, fma(d0, p0, o3[n]))))
        k += 4
    while k < num_inputs:
        w0 = w[k, n0:n1]
        a0, b0, c0, d0 = a[k], b[k], c[k], d[k]
        for n in range(n1 - n0):
            p0 = w0[n]
            o0[n] = fma(a0, p0, o0[n])
            o1[n] = fma(b0, p0, o1[n])
            o2[n] = fma(c0, p0, o2[n])
            o3[n] = fma(d0, p0, o3[n])
        k += 1


@kernel
def _advance_2_rows(x: Any, w: Any, out: Any, m: int, n0: int, n1: int) -> None:
    num_inputs = x.shape[1]
    o0, o1 = out[m, n0:n1], out[m + 1, n0:n1]
    a, b = x[m], x[m + 1]
    k = 0
    while k + 4 <= num_inputs:
        w0, w1, w2, w3 = w[k, n0:n1], w[k + 1, n0:n1], w[k + 2, n0:n1], w[k + 3, n0:n1]
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        for n in range(n1 - n0):
            p0, p1, p2, p3 = w0[n], w1[n], w2[n], w3[n]
            o0[n] = fma(a3, p3, fma(a2, p2, fma(a1, p1, fma(a0, p0, o0[n]))))
            o1[n] = fma(b3, p3, fma(b2, p2, fma(b1, p1, fma(b0, p0, o1[n]))))
        k += 4
    while k < num_inputs:
        w0 = w[k, n0:n1]
        a0, b0 = a[k], b[k]
        for n in range(n1 - n0):
            o0[n] = fma(a0, w0[n], o0[n])
            o1[n] = fma(b0, w0[n], o1[n])
        k += 1


@kernel
def advance_row(a: Any, w: Any, out: Any, n0: int, n1: int) -> None:
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
def advance_rows(x: Any, w: Any, out: Any, n0: int, n1: int, num_rows: int) -> None:
    """out[:, n0:n1] += x @ w[:, n0:n1] for the first `num_rows` rows."""
    m = 0
    while m + 4 <= num_rows:
        _advance_4_rows(x, w, out, m, n0, n1)
        m += 4
    if m + 2 <= num_rows:
        _advance_2_rows(x, w, out, m, n0, n1)
        m += 2
    if m < num_rows:
        advance_row(x[m], w, out[m], n0, n1)


@kernel
def _advance_2_panels(rows: int, x: Any, m: int, w: Any, p: int, out: Any, n: int) -> None:
    if rows == 1:
        advance_tile(1, 2, x, m, w, p, out, n)
    elif rows == 2:
        advance_tile(2, 2, x, m, w, p, out, n)
    elif rows == 3:
        advance_tile(3, 2, x, m, w, p, out, n)
    elif rows == 4:
        advance_tile(4, 2, x, m, w, p, out, n)
    elif rows == 5:
        advance_tile(5, 2, x, m, w, p, out, n)
    else:
        advance_tile(6, 2, x, m, w, p, out, n)


@kernel
def _advance_1_panel(rows: int, x: Any, m: int, w: Any, p: int, out: Any, n: int) -> None:
    if rows == 1:
        advance_tile(1, 1, x, m, w, p, out, n)
    elif rows == 2:
        advance_tile(2, 1, x, m, w, p, out, n)
    elif rows == 3:
        advance_tile(3, 1, x, m, w, p, out, n)
    elif rows == 4:
        advance_tile(4, 1, x, m, w, p, out, n)
    elif rows == 5:
        advance_tile(5, 1, x, m, w, p, out, n)
    else:
        advance_tile(6, 1, x, m, w, p, out, n)


@kernel
def _advance_part(x: Any, w: Any, p: int, out: Any, n: int, num_rows: int) -> None:
    """The last panel, of which `out` has only a part."""
    whole = np.empty((num_rows, PANEL), dtype=np.float32)
    size = out.shape[1] - n
    for m in range(num_rows):
        whole[m, :size] = out[m, n:]
        whole[m, size:] = ZERO
    for m in range(num_rows):
        advance_tile(1, 1, x, m, w, p, whole, 0)
    for m in range(num_rows):
        out[m, n:] = whole[m, :size]


@kernel
def _linear_panels(x_MK: Any, w: Any, out_MN: Any, num_rows: int) -> None:
    """Rows in groups as equal as can be: each reads a panel once."""
    width = out_MN.shape[1]
    groups = (num_rows + ROWS_MAX - 1) // ROWS_MAX
    p = 0
    while (p + 1) * PANEL <= width:
        pair = (p + 2) * PANEL <= width
        for g in range(groups):
            m = g * num_rows // groups
            rows = (g + 1) * num_rows // groups - m
            if pair:
                _advance_2_panels(rows, x_MK, m, w, p, out_MN, p * PANEL)
            else:
                _advance_1_panel(rows, x_MK, m, w, p, out_MN, p * PANEL)
        p += 2 if pair else 1
    if p * PANEL < width:
        _advance_part(x_MK, w, p, out_MN, p * PANEL, num_rows)


@kernel
def linear(x_MK: Any, w: Any, bias_N: Any, out_MN: Any, num_rows: int) -> None:
    """out = bias + x @ w for the first `num_rows` rows; w is `[inputs, outputs]`, or panels."""
    for m in range(num_rows):
        out_MN[m, :] = bias_N
    if w.ndim == 3:
        _linear_panels(x_MK, w, out_MN, num_rows)
    else:
        _linear_plain(x_MK, w, out_MN, num_rows)


@kernel
def _linear_plain(x_MK: Any, w_KN: Any, out_MN: Any, num_rows: int) -> None:
    width = w_KN.shape[1]
    step = width if num_rows == 1 else _COLUMNS_PER_PASS
    for n0 in range(0, width, step):
        advance_rows(x_MK, w_KN, out_MN, n0, min(n0 + step, width), num_rows)


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
def softmax(scores: Any, scale: Any, size: int) -> Any:
    """Replaces the first `size` scores by exp(scale * (score - max)); returns their sum."""
    top = scores[0]
    for i in range(1, size):
        top = max(top, scores[i])
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
        (FLOATS_2D, GIVEN_INTS_1D, FLOATS_1D, PANELS, FLOATS_1D, FLOAT, FLOATS_2D, FLOATS_2D),
    ),
]
