"""The residual stream between attention and MLP: adds what each computed, applies the norm after
it, and computes the router's scores. The stream is float32 and alternates between two buffers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.summed_parts import add_parts_onto

_NORM_WARPS = 8
_ROUTER_MANY_ROWS = 256
"""From so many rows on, a program of the router sums four at a time."""
_FUSED_ROWS_MAX = 8
_ADD_COLUMNS = 1024
_ROUTER_ROWS_MAX = 32  # of one program, one after the other


class Router(NamedTuple):
    """A router's weights, the buffer for its scores, and its bias (float32), if it has one."""

    w_EH: torch.Tensor
    scores_TE: torch.Tensor
    b_E: torch.Tensor | None = None


def embed_norm(
    ids_T: torch.Tensor,
    former_ids_R: torch.Tensor,
    embedding_VH: torch.Tensor,
    norm_H: torch.Tensor,
    x_TH: torch.Tensor,
    h_TH: torch.Tensor,
    *,
    eps: float,
) -> None:
    """Writes the embeddings to `x_TH` and their norm to `h_TH`. An id of -1 - r stands for
    `former_ids_R[r]`, which the step before sampled."""
    rows, hidden = h_TH.shape
    _embed_norm[(rows,)](
        ids_T,
        former_ids_R,
        embedding_VH,
        norm_H,
        x_TH,
        h_TH,
        eps,
        HIDDEN=hidden,
        BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=_NORM_WARPS,
    )


def add_norm(
    x_TH: torch.Tensor,
    parts: torch.Tensor,
    norm_H: torch.Tensor,
    x_out_TH: torch.Tensor,
    h_TH: torch.Tensor,
    *,
    eps: float,
    bias_H: torch.Tensor | None = None,
    router: Router | None = None,
) -> None:
    """`x_out = x + (Σ parts_PTH + bias)`, `h = norm(x_out)`. With `router`, also writes its scores
    of `h`. The bias is float32."""
    rows, hidden = h_TH.shape
    num_parts = parts.shape[0]
    fused = router is not None and rows <= _FUSED_ROWS_MAX
    own = router if router is not None and fused else Router(norm_H, h_TH)
    w_router, scores = own.w_EH, own.scores_TE
    experts, block = w_router.shape[0] if fused else 0, _router_experts(hidden)
    _add_norm[(rows, max(triton.cdiv(experts, block), 1))](
        x_TH,
        parts,
        norm_H,
        x_out_TH,
        h_TH,
        norm_H if bias_H is None else bias_H,
        w_router,
        norm_H if own.b_E is None else own.b_E,
        scores,
        eps,
        rows * hidden,
        HIDDEN=hidden,
        BLOCK_H=triton.next_power_of_2(hidden),
        PARTS=num_parts,
        EXPERTS=experts,
        BLOCK_E=block,
        BIASED=bias_H is not None,
        ROUTER_BIASED=own.b_E is not None,
        num_warps=_router_warps(hidden),
    )
    if router is not None and not fused:
        _score(h_TH, router)


def add_pairs_norm(
    x_TH: torch.Tensor,
    y_NH: torch.Tensor,
    slots_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    norm_H: torch.Tensor,
    x_out_TH: torch.Tensor,
    h_TH: torch.Tensor,
    *,
    eps: float,
) -> None:
    """`x_out = x + Σ_k weights_TK · y_TKH`, added in the order of k, and `h = norm(x_out)`. Pairs
    without a slot count as zero."""
    rows, hidden = h_TH.shape
    _add_pairs_norm[(rows,)](
        x_TH,
        y_NH,
        slots_TK,
        weights_TK,
        norm_H,
        x_out_TH,
        h_TH,
        eps,
        HIDDEN=hidden,
        BLOCK_H=triton.next_power_of_2(hidden),
        TOP_K=slots_TK.shape[1],
        num_warps=_NORM_WARPS,
    )


def add_parts(x_TH: torch.Tensor, parts_PTH: torch.Tensor) -> None:
    """`x += Σ parts_PTH`, in place."""
    num_parts, rows, hidden = parts_PTH.shape
    _add_parts[(rows, triton.cdiv(hidden, _ADD_COLUMNS))](
        x_TH,
        parts_PTH,
        rows * hidden,
        HIDDEN=hidden,
        BLOCK_H=_ADD_COLUMNS,
        PARTS=num_parts,
        num_warps=4,
    )


def _router_experts(hidden: int) -> int:
    """Experts per program. This is part of the reduction's shape, so it depends on the model
    alone."""
    return 8 if hidden <= 4096 else 4


def _router_warps(hidden: int) -> int:
    """Fewer warps exchange less for a sum, if their registers hold the weights. This determines the
    order of the sums, too."""
    return 4 if hidden <= 2048 else 8


def _score(h_TH: torch.Tensor, router: Router) -> None:
    rows, hidden = h_TH.shape
    experts, block = router.w_EH.shape[0], _router_experts(hidden)
    rows_each = min(max(2, int(triton.next_power_of_2(triton.cdiv(rows, 16)))), _ROUTER_ROWS_MAX)
    grid = (triton.cdiv(experts, block), triton.cdiv(rows, rows_each))
    _score_rows[grid](
        h_TH,
        router.w_EH,
        router.w_EH if router.b_E is None else router.b_E,
        router.scores_TE,
        rows,
        HIDDEN=hidden,
        BLOCK_H=triton.next_power_of_2(hidden),
        EXPERTS=experts,
        BLOCK_E=block,
        BLOCK_T=rows_each,
        BY_FOUR=rows >= _ROUTER_MANY_ROWS,
        BIASED=router.b_E is not None,
        num_warps=_router_warps(hidden),
    )


@triton.jit
def _norm(x, norm_w, eps, HIDDEN: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps) * norm_w


@triton.jit
def _router_tile(
    w_ptr,
    first,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    e = first + tl.arange(0, BLOCK_E)
    i = tl.arange(0, BLOCK_H)
    mask = (e[:, None] < EXPERTS) & (i[None, :] < HIDDEN)
    return tl.load(w_ptr + e[:, None] * HIDDEN + i[None, :], mask=mask, other=0.0)


@triton.jit
def _with_bias(scores, bias_ptr, e, EXPERTS: tl.constexpr, BIASED: tl.constexpr):
    if BIASED:
        scores += tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0)
    return scores


@triton.jit
def _products(w, h):
    """Every caller sums them in the same block shape: the order of the sum changes the bits."""
    return w.to(tl.float32) * h.to(tl.float32)[None, :]


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _embed_norm(
    ids_ptr,
    former_ids_ptr,
    embedding_ptr,
    norm_ptr,
    x_ptr,
    h_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_H)
    mask = i < HIDDEN
    norm_w = tl.load(norm_ptr + i, mask=mask, other=0.0).to(tl.float32)
    token = tl.load(ids_ptr + row)
    former = tl.load(former_ids_ptr + tl.maximum(-1 - token, 0))
    # A row without finite logits samples -1; what follows it is discarded.
    token = tl.where(token < 0, tl.maximum(former, 0), token).to(tl.int64)
    x = tl.load(embedding_ptr + token * HIDDEN + i, mask=mask, other=0.0).to(tl.float32)
    h = _norm(x, norm_w, eps, HIDDEN)
    tl.store(x_ptr + row * HIDDEN + i, x, mask=mask)
    tl.store(h_ptr + row * HIDDEN + i, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["part_stride"])
def _add_norm(
    x_ptr,
    parts_ptr,
    norm_ptr,
    x_out_ptr,
    h_ptr,
    bias_ptr,
    router_ptr,
    router_bias_ptr,
    scores_ptr,
    eps,
    part_stride,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BIASED: tl.constexpr,
    ROUTER_BIASED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_E
    i = tl.arange(0, BLOCK_H)
    mask = i < HIDDEN
    norm_w = tl.load(norm_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if EXPERTS > 0:
        w = _router_tile(router_ptr, first, HIDDEN, EXPERTS, BLOCK_E, BLOCK_H)
    x = tl.load(x_ptr + row * HIDDEN + i, mask=mask, other=0.0)
    x = add_parts_onto(x, parts_ptr + row * HIDDEN, i, part_stride, mask, PARTS, bias_ptr, BIASED)
    h = _norm(x, norm_w, eps, HIDDEN).to(h_ptr.dtype.element_ty)
    if first == 0:
        tl.store(x_out_ptr + row * HIDDEN + i, x, mask=mask)
        tl.store(h_ptr + row * HIDDEN + i, h, mask=mask)
    if EXPERTS > 0:
        e = first + tl.arange(0, BLOCK_E)
        scores = tl.sum(_products(w, h), axis=1)
        scores = _with_bias(scores, router_bias_ptr, e, EXPERTS, ROUTER_BIASED)
        tl.store(scores_ptr + row * EXPERTS + e, scores, mask=e < EXPERTS)


@triton.jit
def _add_pairs_norm(
    x_ptr,
    y_ptr,
    slots_ptr,
    weights_ptr,
    norm_ptr,
    x_out_ptr,
    h_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TOP_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_H)
    mask = i < HIDDEN
    norm_w = tl.load(norm_ptr + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * HIDDEN + i, mask=mask, other=0.0)
    moe = tl.zeros([BLOCK_H], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = row * TOP_K + k
        has_slot = tl.load(slots_ptr + pair) >= 0
        y = tl.load(y_ptr + pair * HIDDEN + i, mask=mask & has_slot, other=0.0)
        moe += tl.load(weights_ptr + pair) * y.to(tl.float32)
    x += moe
    h = _norm(x, norm_w, eps, HIDDEN)
    tl.store(x_out_ptr + row * HIDDEN + i, x, mask=mask)
    tl.store(h_ptr + row * HIDDEN + i, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["part_stride"])
def _add_parts(
    x_ptr,
    parts_ptr,
    part_stride,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = i < HIDDEN
    x = tl.load(x_ptr + row * HIDDEN + i, mask=mask, other=0.0)
    x = add_parts_onto(x, parts_ptr + row * HIDDEN, i, part_stride, mask, PARTS)
    tl.store(x_ptr + row * HIDDEN + i, x, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _score_rows(
    h_ptr,
    router_ptr,
    bias_ptr,
    scores_ptr,
    num_rows,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BY_FOUR: tl.constexpr,
    BIASED: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_E
    i = tl.arange(0, BLOCK_H)
    e = first + tl.arange(0, BLOCK_E)
    w = _router_tile(router_ptr, first, HIDDEN, EXPERTS, BLOCK_E, BLOCK_H)
    start = tl.program_id(1) * BLOCK_T
    end = tl.minimum(start + BLOCK_T, num_rows)
    if BY_FOUR:
        for row in range(start, end, 4):
            products = ()
            for r in tl.static_range(4):
                at = tl.minimum(row + r, end - 1) * HIDDEN + i
                h = tl.load(h_ptr + at, mask=i < HIDDEN, other=0.0)
                products = products + (_products(w, h),)  # type: ignore[assignment]  # noqa: RUF005
            # Sums side by side wait only once for the other threads.
            scores = tl.reduce(products, 1, _add_four)
            for r in tl.static_range(4):
                out = scores_ptr + (row + r) * EXPERTS + e
                score = _with_bias(scores[r], bias_ptr, e, EXPERTS, BIASED)
                tl.store(out, score, mask=(e < EXPERTS) & (row + r < end))
    else:
        for row in range(start, end):
            h = tl.load(h_ptr + row * HIDDEN + i, mask=i < HIDDEN, other=0.0)
            scores = tl.sum(_products(w, h), axis=1)
            scores = _with_bias(scores, bias_ptr, e, EXPERTS, BIASED)
            tl.store(scores_ptr + row * EXPERTS + e, scores, mask=e < EXPERTS)
