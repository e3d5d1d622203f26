"""CPU kernels of a rank, batch-invariant by construction. Owns every floating-point operation
between the token ids and the logits; owns no buffer and no weight.

Each output element is one chain of fused multiply-adds in a fixed order (k ascending), spelt out
with `fma` so that no compiler choice can change a bit. Blocking and unrolling only change which
elements advance together. Hence no result depends on the other rows of a call, on how a prompt was
cut into chunks, or on which rank ran it, and machines with different vector widths agree.

Everything is in one file because numba's disk cache watches only the file of the entry point.

Shape letters: T tokens of the step, S sequences, B KV blocks of a sequence, R wanted rows,
H hidden size, P width of q+k+v, O width of all query heads, D head size, V vocabulary,
E experts, K top-k, I expert's inner size, M rows that this rank's experts see, N (row, slot) pairs,
C context positions that the score buffer holds.
Weights lie transposed, `[inputs, outputs]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_COLUMNS_PER_PASS = 1024
"""Wide outputs are made in passes so that four rows of a pass stay in the L1 cache."""

_LOG2_E = np.float32(math.log2(math.e))
_LN_2_HIGH = np.float32(355 / 512)  # few bits, so that n * _LN_2_HIGH is exact
_LN_2_LOW = np.float32(math.log(2) - 355 / 512)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_EXP_MIN = np.float32(-87.0)
_EXP_MAX = np.float32(88.0)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_EXP_2, _EXP_3, _EXP_4, _EXP_5, _EXP_6, _EXP_7 = (
    np.float32(1 / math.factorial(n)) for n in range(2, 8)
)


def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), build


def _float_bits(typing_context: Any, value: Any) -> Any:
    """The int32 with the bits of a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


def _bits_float(typing_context: Any, value: Any) -> Any:
    """The float32 with the bits of an int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


# Any: numba's own annotation counts the typing context as an argument of the call.
fma: Any = intrinsic(_fma)
float_bits: Any = intrinsic(_float_bits)
bits_float: Any = intrinsic(_bits_float)


@njit(nogil=True, cache=True, inline="always")
def exp32(x: Any) -> Any:
    """e**x, clamped to float32's normal range; our own, because libraries' differ between their
    scalar and vector forms and between versions."""
    x = min(max(x, _EXP_MIN), _EXP_MAX)
    shifted = fma(x, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN_2_LOW, fma(n, -_LN_2_HIGH, x))
    p = fma(r, fma(r, fma(r, fma(r, fma(r, _EXP_7, _EXP_6), _EXP_5), _EXP_4), _EXP_3), _EXP_2)
    p = fma(r, fma(r, p, _ONE), _ONE)
    return bits_float(np.int32(float_bits(p) + (float_bits(shifted) << np.int32(23))))


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _advance_row(a: Any, w: Any, out: Any, n0: int, n1: int) -> None:
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


@njit(nogil=True, cache=True)
def linear(x_MK: Any, w_KN: Any, bias_N: Any, out_MN: Any, num_rows: int) -> None:
    """out = bias + x @ w for the first `num_rows` rows."""
    width = w_KN.shape[1]
    for m in range(num_rows):
        out_MN[m, :] = bias_N
    step = width if num_rows == 1 else _COLUMNS_PER_PASS
    for n0 in range(0, width, step):
        n1 = min(n0 + step, width)
        m = 0
        while m + 4 <= num_rows:
            _advance_4_rows(x_MK, w_KN, out_MN, m, n0, n1)
            m += 4
        if m + 2 <= num_rows:
            _advance_2_rows(x_MK, w_KN, out_MN, m, n0, n1)
            m += 2
        if m < num_rows:
            _advance_row(x_MK[m], w_KN, out_MN[m], n0, n1)


@njit(nogil=True, cache=True)
def _rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """Root-mean-square norm of one vector, in four interleaved sums. `out` may be `x`."""
    size = x.shape[0]
    s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
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
    scale = _ONE / np.sqrt(((s0 + s1) + (s2 + s3)) / np.float32(size) + eps)
    for i in range(size):
        out[i] = (x[i] * scale) * weight[i]


@njit(nogil=True, cache=True)
def norm_rows(x_TH: Any, weight_H: Any, eps: Any, out_TH: Any, num_rows: int) -> None:
    for t in range(num_rows):
        _rms_norm(x_TH[t], weight_H, eps, out_TH[t])


@njit(nogil=True, cache=True)
def add_rows(x_TH: Any, y_TH: Any, num_rows: int) -> None:
    """x += y for the first `num_rows` rows."""
    for t in range(num_rows):
        for i in range(x_TH.shape[1]):
            x_TH[t, i] += y_TH[t, i]


@njit(nogil=True, cache=True)
def _rotate(head: Any, cos: Any, sin: Any) -> None:
    half = cos.shape[0]
    for i in range(half):
        low, high = head[i], head[i + half]
        head[i] = low * cos[i] - high * sin[i]
        head[i + half] = high * cos[i] + low * sin[i]


@njit(nogil=True, cache=True)
def _place_qkv(
    qkv_P: Any, position: int, block: int, k_cache: Any, v_cache: Any,
    q_norm_D: Any, k_norm_D: Any, eps: Any, cos_CD: Any, sin_CD: Any,
) -> None:  # fmt: skip
    """Norms and rotates the query heads in place, the key heads into the cache, and copies the
    value heads there."""
    num_kv_heads, head_size, block_tokens = k_cache.shape[1:]
    num_heads = qkv_P.shape[0] // head_size - 2 * num_kv_heads
    cos, sin = cos_CD[position], sin_CD[position]
    offset = position % block_tokens
    for h in range(num_heads + num_kv_heads):
        head = qkv_P[h * head_size : (h + 1) * head_size]
        _rms_norm(head, q_norm_D if h < num_heads else k_norm_D, eps, head)
        _rotate(head, cos, sin)
    for h in range(num_kv_heads):
        key = (num_heads + h) * head_size
        value = key + num_kv_heads * head_size
        for i in range(head_size):
            k_cache[block, h, i, offset] = qkv_P[key + i]
            v_cache[block, h, offset, i] = qkv_P[value + i]


@njit(nogil=True, cache=True)
def _softmax(scores: Any, scale: Any, size: int) -> Any:
    """Replaces the first `size` scores by exp(scale * (score - max)); returns their sum."""
    top = scores[0]
    for i in range(1, size):
        top = max(top, scores[i])
    for i in range(size):
        scores[i] = exp32((scores[i] - top) * scale)
    s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
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


@njit(nogil=True, cache=True)
def _attend_heads(
    q_GD: Any, kv_head: int, table_B: Any, context: int, k_cache: Any, v_cache: Any,
    scale: Any, scores_GC: Any, out_GD: Any,
) -> None:  # fmt: skip
    """One query row, the G heads that share `kv_head`, over positions 0 … context-1. Keys lie as
    [D, block_tokens] in a block, so that scores too are chains in order of D."""
    block_tokens = k_cache.shape[3]
    for first in range(0, context, block_tokens):
        keys = k_cache[table_B[first // block_tokens], kv_head]
        for g in range(q_GD.shape[0]):
            scores = scores_GC[g, first : first + block_tokens]
            scores[:] = _ZERO
            _advance_row(q_GD[g], keys, scores, 0, block_tokens)
    out_GD[:, :] = _ZERO
    for g in range(q_GD.shape[0]):
        total = _softmax(scores_GC[g], scale, context)
        for first in range(0, context, block_tokens):
            size = min(block_tokens, context - first)
            values = v_cache[table_B[first // block_tokens], kv_head, :size]
            _advance_row(scores_GC[g, first : first + size], values, out_GD[g], 0, out_GD.shape[1])
        for i in range(out_GD.shape[1]):
            out_GD[g, i] /= total


@njit(nogil=True, cache=True)
def attend(
    x_TH: Any, position_T: Any, sequence_T: Any, table_SB: Any, k_cache: Any, v_cache: Any,
    norm_H: Any, w_qkv: Any, b_qkv: Any, q_norm_D: Any, k_norm_D: Any, w_o: Any, b_o: Any,
    cos_CD: Any, sin_CD: Any, eps: Any, scale: Any, h_TH: Any, qkv_TP: Any, out_TO: Any,
    scores_GC: Any,
) -> None:  # fmt: skip
    """The attention half of a layer: x += attention(norm(x)). Writes the tokens' KV first, then
    lets every row attend on its own. `h_TH`, `qkv_TP`, `out_TO` and `scores_GC` are scratch."""
    num_tokens = position_T.shape[0]
    num_kv_heads, head_size, block_tokens = k_cache.shape[1:]
    group = out_TO.shape[1] // (head_size * num_kv_heads)
    norm_rows(x_TH, norm_H, eps, h_TH, num_tokens)
    linear(h_TH, w_qkv, b_qkv, qkv_TP, num_tokens)
    for t in range(num_tokens):
        position = position_T[t]
        block = table_SB[sequence_T[t], position // block_tokens]
        _place_qkv(
            qkv_TP[t], position, block, k_cache, v_cache, q_norm_D, k_norm_D, eps, cos_CD, sin_CD
        )
    for t in range(num_tokens):
        for j in range(num_kv_heads):
            first, last = j * group * head_size, (j + 1) * group * head_size
            _attend_heads(
                qkv_TP[t, first:last].reshape(group, head_size), j, table_SB[sequence_T[t]],
                position_T[t] + 1, k_cache, v_cache, scale, scores_GC,
                out_TO[t, first:last].reshape(group, head_size),
            )  # fmt: skip
    linear(out_TO, w_o, b_o, h_TH, num_tokens)
    add_rows(x_TH, h_TH, num_tokens)


@njit(nogil=True, cache=True)
def _choose_experts(logits_E: Any, experts_K: Any, weights_K: Any, normalise: bool) -> None:
    """Top-k by logit, the lower expert first among equals; weights are softmax probabilities."""
    num_experts = logits_E.shape[0]
    for k in range(experts_K.shape[0]):
        best = -1
        for e in range(num_experts):
            taken = False
            for j in range(k):
                taken = taken or experts_K[j] == e
            if not taken and (best < 0 or logits_E[e] > logits_E[best]):
                best = e
        experts_K[k] = best
    total = _softmax(logits_E, _ONE, num_experts)
    for k in range(experts_K.shape[0]):
        weights_K[k] = logits_E[experts_K[k]] / total
    if normalise:
        total = _ZERO
        for k in range(experts_K.shape[0]):
            total += weights_K[k]
        for k in range(experts_K.shape[0]):
            weights_K[k] /= total


@njit(nogil=True, cache=True)
def route(
    x_TH: Any, norm_H: Any, w_router: Any, zeros: Any, eps: Any, normalise: bool, h_TH: Any,
    logits_TE: Any, experts_TK: Any, weights_TK: Any, num_tokens: int,
) -> None:  # fmt: skip
    """h = norm(x); its experts and their weights. `logits_TE` is scratch."""
    norm_rows(x_TH, norm_H, eps, h_TH, num_tokens)
    linear(h_TH, w_router, zeros[: w_router.shape[1]], logits_TE, num_tokens)
    for t in range(num_tokens):
        _choose_experts(logits_TE[t], experts_TK[t], weights_TK[t], normalise)


@njit(nogil=True, cache=True)
def _order_by_slot(slots_N: Any, order_N: Any, ends_S: Any) -> None:
    """A stable counting sort: pairs of slot s are order[ends[s-1]:ends[s]]."""
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


@njit(nogil=True, cache=True)
def _gate(gate_up: Any, out: Any) -> None:
    """out = silu(gate) * up for one row."""
    size = out.shape[0]
    gate, up = gate_up[:size], gate_up[size:]
    for i in range(size):
        out[i] = (gate[i] / (_ONE + exp32(-gate[i]))) * up[i]


@njit(nogil=True, cache=True)
def run_experts(
    x_MH: Any, rows_N: Any, slots_N: Any, w_gate_up: Any, w_down: Any, zeros: Any, y_NH: Any,
    order_N: Any, ends_S: Any, x_NH: Any, gate_up_NJ: Any, inner_NI: Any, out_NH: Any,
) -> None:  # fmt: skip
    """y[n] = expert in slot slots[n] applied to x[rows[n]]. Weights `[S, H, 2I]` and `[S, I, H]`;
    a slot's are read once per call. All after `y_NH` is scratch."""
    _order_by_slot(slots_N, order_N, ends_S)
    first = 0
    for s in range(ends_S.shape[0]):
        size = ends_S[s] - first
        for i in range(size):
            x_NH[i, :] = x_MH[rows_N[order_N[first + i]]]
        linear(x_NH, w_gate_up[s], zeros[: w_gate_up.shape[2]], gate_up_NJ, size)
        for i in range(size):
            _gate(gate_up_NJ[i], inner_NI[i])
        linear(inner_NI, w_down[s], zeros[: w_down.shape[2]], out_NH, size)
        for i in range(size):
            y_NH[order_N[first + i], :] = out_NH[i]
        first = ends_S[s]


@njit(nogil=True, cache=True)
def add_weighted(x_TH: Any, y_TKH: Any, weights_TK: Any, num_tokens: int) -> None:
    """x[t] += sum over k, in order, of weights[t, k] * y[t, k]."""
    for t in range(num_tokens):
        for i in range(x_TH.shape[1]):
            total = _ZERO
            for k in range(weights_TK.shape[1]):
                total = fma(weights_TK[t, k], y_TKH[t, k, i], total)
            x_TH[t, i] += total


@njit(nogil=True, cache=True)
def head_logits(
    x_TH: Any, rows_R: Any, norm_H: Any, w_head: Any, zeros: Any, eps: Any, h_TH: Any, out_RV: Any
) -> None:
    """Logits of the rows `rows_R`. `h_TH` is scratch."""
    for r in range(rows_R.shape[0]):
        _rms_norm(x_TH[rows_R[r]], norm_H, eps, h_TH[r])
    linear(h_TH, w_head, zeros[: w_head.shape[1]], out_RV, rows_R.shape[0])


def warm_up(on_progress: Callable[[int, int], None] | None = None) -> None:
    """Compiles every entry point (ten seconds of CPU or more), or loads it from numba's cache (half
    a second). Afterwards a call with other types fails, where it would have stalled the engine with
    a compilation."""
    signatures = _signatures()
    for done, (kernel, signature) in enumerate(signatures):
        if not kernel.signatures:
            kernel.compile(signature)
            kernel.disable_compile()
        if on_progress is not None:
            on_progress(done + 1, len(signatures))


def _signatures() -> list[tuple[Any, tuple[Any, ...]]]:
    """The entry points. What comes from outside the model may be read-only (`given`)."""
    f, i, flag = types.float32, types.intp, types.boolean
    f1, f2, f3, f4 = f[::1], f[:, ::1], f[:, :, ::1], f[:, :, :, ::1]
    i1, i2 = types.int32[::1], types.int32[:, ::1]

    def given(dtype: Any, ndim: int) -> Any:
        return types.Array(dtype, ndim, "C", readonly=True)

    n1, n2 = given(types.int32, 1), given(types.int32, 2)
    g2, g3 = given(f, 2), given(f, 3)
    return [
        (
            attend,
            (f2, n1, n1, n2, f4, f4, f1, f2, f1, f1, f1, f2, f1, f2, f2, f, f, f2, f2, f2, f2),
        ),
        (route, (f2, f1, f2, f1, f, flag, f2, f2, i2, f2, i)),
        (run_experts, (g2, n1, n1, f3, f3, f1, f2, i1, i1, f2, f2, f2, f2)),
        (add_weighted, (f2, g3, f2, i)),
        (head_logits, (f2, n1, f1, f2, f1, f, f2, f2)),
        (norm_rows, (f2, f1, f, f2, i)),
        (add_rows, (f2, f2, i)),
    ]
