"""A step's queries, keys and values as the projection leaves them, and the kernels before attention
that make heads of them: norm and rotation of queries and keys, and the write into the paged cache
`k_BJUD`, `v_BJUD`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, QK_NORM_NONE, QK_NORM_WHOLE
from gpu_worker.cuda.kernels.cached_values import to_cached
from gpu_worker.cuda.kernels.paging import Paging, cache_row
from gpu_worker.cuda.kernels.rotated_heads import rotated_key, rotated_queries, summed_value

ROTATION_WARPS = 4
"""The number of warps of a rotation changes its bits."""
_SCALE_WARPS = 8


class QkvParts(NamedTuple):
    """A step's queries, keys and values as parts of a split-K GEMM, side by side in this order, and
    the inputs of bias, norm and rotation. Cosines and sines are by position, for as many elements
    of a head as are rotated.

    Without norms there is nothing in their place. They are per head, or with `scales_T2` (float32,
    which `norm_scales` fills) for all heads together: that of the row's queries, that of its keys.
    `bias_C` is float32. `clip` bounds queries, keys and values after the norm; 0: no bound.
    """

    qkv_PTC: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    cos_CD: torch.Tensor
    sin_CD: torch.Tensor
    eps: float
    bias_C: torch.Tensor | None = None
    scales_T2: torch.Tensor | None = None
    clip: float = 0.0

    @property
    def norm(self) -> int:
        """QK_NORM_NONE, QK_NORM_HEAD or QK_NORM_WHOLE."""
        if self.q_norm is None:
            return QK_NORM_NONE
        return QK_NORM_HEAD if self.scales_T2 is None else QK_NORM_WHOLE

    def arguments(self) -> tuple[torch.Tensor | float, ...]:
        """What kernels take, in their order. A tensor that is not there is never read."""
        unused = self.qkv_PTC
        tensors = (
            self.qkv_PTC,
            unused if self.q_norm is None else self.q_norm,
            unused if self.k_norm is None else self.k_norm,
            unused if self.bias_C is None else self.bias_C,
            unused if self.scales_T2 is None else self.scales_T2,
            self.cos_CD,
            self.sin_CD,
        )
        return (*tensors, self.eps, self.clip)

    def form(self) -> dict[str, int | bool]:
        """What kernels are compiled for."""
        return {
            "ROTATED": 2 * self.cos_CD.shape[1],
            "NORM": self.norm,
            "BIASED": self.bias_C is not None,
            "CLIPPED": self.clip > 0.0,
        }


def norm_scales(qkv_parts: QkvParts, *, q_size: int, kv_size: int) -> None:
    """Fills `scales_T2`: the reciprocals of the root mean square over all heads of a row's queries,
    and over all of its keys."""
    assert qkv_parts.scales_T2 is not None, "these norms are per head"
    parts, rows, columns = qkv_parts.qkv_PTC.shape
    _norm_scales[(rows, 2)](
        qkv_parts.qkv_PTC,
        qkv_parts.qkv_PTC if qkv_parts.bias_C is None else qkv_parts.bias_C,
        qkv_parts.scales_T2,
        qkv_parts.eps,
        rows * columns,
        PARTS=parts,
        Q_SIZE=q_size,
        KV_SIZE=kv_size,
        BLOCK=triton.next_power_of_2(q_size),
        BIASED=qkv_parts.bias_C is not None,
        num_warps=_SCALE_WARPS,
    )


def rotate_and_store(
    qkv_parts: QkvParts,
    paging: Paging,
    q_TQD: torch.Tensor,
    k_BJUD: torch.Tensor,
    v_BJUD: torch.Tensor,
) -> None:
    """Writes normed and rotated queries to `q_TQD`, and keys and values to the cache."""
    parts, rows, columns = qkv_parts.qkv_PTC.shape
    _, heads, head_dim = q_TQD.shape
    _, num_kv_heads, block_tokens, _ = k_BJUD.shape
    _rotate_and_store[(rows, 3 * num_kv_heads)](
        *qkv_parts.arguments(),
        paging.position_T,
        paging.sequence_T,
        paging.tables_SB,
        q_TQD,
        k_BJUD,
        v_BJUD,
        rows * columns,
        paging.tables_SB.shape[1],
        PARTS=parts,
        HEADS=heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROWS=max(16, triton.next_power_of_2(heads // num_kv_heads)),
        BLOCK_TOKENS=block_tokens,
        **qkv_parts.form(),
        num_warps=ROTATION_WARPS,
    )


@triton.jit(do_not_specialize=["part_stride"])
def _norm_scales(
    qkv_ptr,
    bias_ptr,
    scales_ptr,
    eps,
    part_stride,
    PARTS: tl.constexpr,
    Q_SIZE: tl.constexpr,
    KV_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
):
    """The first of two programs of a row is for its queries, the second for its keys."""
    row = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    size = tl.where(kind == 0, Q_SIZE, KV_SIZE)
    i = tl.arange(0, BLOCK)
    column = kind * Q_SIZE + i
    x = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        ptr = qkv_ptr + part * part_stride.to(tl.int64) + row * (Q_SIZE + 2 * KV_SIZE)
        x += tl.load(ptr + column, mask=i < size, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias_ptr + column, mask=i < size, other=0.0)
    tl.store(scales_ptr + row * 2 + kind, tl.rsqrt(tl.sum(x * x, axis=0) / size + eps))


@triton.jit(do_not_specialize=["part_stride", "table_width"])
def _rotate_and_store(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    bias_ptr,
    scales_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    clip,
    position_ptr,
    sequence_ptr,
    tables_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    part_stride,
    table_width,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,
    BIASED: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """Per row and KV head there are three programs: one rotates the queries that share the key, one
    rotates the key, and one stores the value."""
    row = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    r = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD_DIM)
    position = tl.load(position_ptr + row)
    row_ptr = qkv_ptr + row * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    if position >= 0:
        if kind == 0:
            is_head = r < HEADS // KV_HEADS
            head = kv_head * (HEADS // KV_HEADS) + r
            q = rotated_queries(
                row_ptr, q_norm_ptr, bias_ptr, scales_ptr + row * 2, cos_ptr, sin_ptr, eps, clip,
                position, part_stride, head, is_head, PARTS, ROWS, HEAD_DIM, ROTATED, NORM, BIASED,
                CLIPPED,
            )  # fmt: skip
            out = q_ptr + (row * HEADS + head[:, None]) * HEAD_DIM + d[None, :]
            tl.store(out, q.to(q_ptr.dtype.element_ty), mask=is_head[:, None])
        else:
            sequence = tl.load(sequence_ptr + row)
            cached = cache_row(
                tables_ptr, sequence, position, kv_head, table_width, KV_HEADS, BLOCK_TOKENS
            )
            if kind == 1:
                column = (HEADS + kv_head) * HEAD_DIM
                key = rotated_key(
                    row_ptr, k_norm_ptr, bias_ptr, scales_ptr + row * 2, cos_ptr, sin_ptr, eps,
                    clip, position, part_stride, kv_head, column, PARTS, HEAD_DIM, ROTATED, NORM,
                    BIASED, CLIPPED,
                )  # fmt: skip
                tl.store(k_ptr + cached * HEAD_DIM + d, to_cached(key, k_ptr.dtype.element_ty))
            else:
                column = (HEADS + KV_HEADS + kv_head) * HEAD_DIM
                value = summed_value(
                    row_ptr, bias_ptr, clip, part_stride, column, d, PARTS, HEAD_DIM, BIASED,
                    CLIPPED,
                )  # fmt: skip
                value = to_cached(value, v_ptr.dtype.element_ty)
                tl.store(v_ptr + cached * HEAD_DIM + d, value)
