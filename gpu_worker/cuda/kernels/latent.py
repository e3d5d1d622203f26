"""Multi-head latent attention over the paged cache: norms, rotation and the write into the cache;
queries into the latent space and sums out of it; and attention there, in splits of positions.

The cache holds each token's normed latent `latent_BUR`, in a format of `cached_values`, and its
rotated shared key `key_BUW`, always in the model's own: a rounded angle would be wrong by more the
further it is away. All heads read the same rows. Each row is its own tile, in prefill as in decode,
so the model alone determines the shape of every dot product and sum. More shape letters: A heads, R
rank of the latent, M rank of the queries' latent, F the unrotated size of a head's query, W the
rotated size, G the size of a head's value."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.cached_values import to_cached
from gpu_worker.cuda.kernels.paging import Paging, cache_row, cache_rows
from gpu_worker.cuda.kernels.splits import (
    SPLITS_MAX,
    Partials,
    merge_splits,
    split_size,
    store_partials,
)
from gpu_worker.cuda.kernels.summed_parts import add_parts_onto, sum_pairs

SPLIT_TOKENS = 256
_LOG2_E = 1.4426950408889634


class LatentTile(NamedTuple):
    """Launch parameters: heads and positions of a dot product, and more. All but `stages` and
    `programs` change the bits of the result."""

    heads: int
    step_tokens: int
    warps: int
    stages: int
    programs: int


# No register spills with these at rank 512.
LATENT_TILE = LatentTile(heads=32, step_tokens=32, warps=8, stages=2, programs=1024)


class HeadColumns(NamedTuple):
    """The columns of head a in a row start at `first + a · stride`."""

    first: int
    stride: int


class LatentCache(NamedTuple):
    """The cache of one layer."""

    latent_BUR: torch.Tensor
    key_BUW: torch.Tensor


class SelectedPositions(NamedTuple):
    """The positions that each row attends to, as rows of the cache (int32): the first `last + 1` of
    its K. A `last` of -1 means none."""

    cached_TK: torch.Tensor
    last_T: torch.Tensor


class Rotation(NamedTuple):
    """Cosines and sines by position, float32. With `interleaved`, rotated pairs are neighbouring
    elements; otherwise they are one element of each half."""

    cos_CD: torch.Tensor
    sin_CD: torch.Tensor
    interleaved: bool


def norm_and_store(
    in_PTC: torch.Tensor,
    q_norm_M: torch.Tensor | None,
    kv_norm_R: torch.Tensor,
    rotation: Rotation,
    paging: Paging,
    q_TM: torch.Tensor | None,
    cache: LatentCache,
    *,
    eps: float,
) -> None:
    """Norms and rotates the columns of `in_PTC`: queries, latent, shared key. If queries have a
    latent, they are normed into `q_TM`. The latents and keys of rows with a token go into the
    cache."""
    parts, rows, columns = in_PTC.shape
    _, block_tokens, rank = cache.latent_BUR.shape
    rotated = cache.key_BUW.shape[2]
    q_lora_rank = 0 if q_TM is None else q_TM.shape[1]
    _norm_and_store[(rows, 2 if q_lora_rank else 1)](
        in_PTC,
        kv_norm_R if q_norm_M is None else q_norm_M,
        kv_norm_R,
        rotation.cos_CD,
        rotation.sin_CD,
        paging.position_T,
        paging.sequence_T,
        paging.tables_SB,
        in_PTC if q_TM is None else q_TM,
        *cache,
        eps,
        rows * columns,
        paging.tables_SB.shape[1],
        PARTS=parts,
        COLUMNS=columns,
        Q_RANK=q_lora_rank,
        BLOCK_M=triton.next_power_of_2(max(q_lora_rank, 16)),
        RANK=rank,
        HALF=rotated // 2,
        BLOCK_TOKENS=block_tokens,
        INTERLEAVED=rotation.interleaved,
        num_warps=4,
    )


def rotate_queries(
    q_PTN: torch.Tensor,
    rotation: Rotation,
    position_T: torch.Tensor,
    head_columns: HeadColumns,
    q_rotated_TAW: torch.Tensor,
) -> None:
    """Writes the rotated part of each head, which starts at `head_columns` in `q_PTN`."""
    parts, rows, columns = q_PTN.shape
    _, heads, rotated = q_rotated_TAW.shape
    block = min(16, triton.next_power_of_2(heads))
    _rotate_queries[(rows, triton.cdiv(heads, block))](
        q_PTN,
        rotation.cos_CD,
        rotation.sin_CD,
        position_T,
        q_rotated_TAW,
        rows * columns,
        PARTS=parts,
        COLUMNS=columns,
        FIRST=head_columns.first,
        STRIDE=head_columns.stride,
        HEADS=heads,
        HALF=rotated // 2,
        BLOCK_A=block,
        INTERLEAVED=rotation.interleaved,
        num_warps=4,
    )


def multiply_heads(
    x_PTC: torch.Tensor, head_columns: HeadColumns, w_ANK: torch.Tensor, out_TAN: torch.Tensor
) -> None:
    """`out[t, a] = x[t, a] w[a]ᵀ`. The K elements of head a start at `head_columns` in a row."""
    parts, rows, columns = x_PTC.shape
    heads, size, inner = w_ANK.shape
    block_rows = 16 if rows <= 16 else 32
    block_columns, depth = math.gcd(64, size), math.gcd(64 if parts > 1 else 128, inner)
    assert min(block_columns, depth) >= 16, "head sizes must be multiples of 16"
    _multiply_heads[(size // block_columns, heads, triton.cdiv(rows, block_rows))](
        x_PTC,
        w_ANK,
        out_TAN,
        rows,
        rows * columns,
        PARTS=parts,
        COLUMNS=columns,
        FIRST=head_columns.first,
        STRIDE=head_columns.stride,
        HEADS=heads,
        SIZE=size,
        INNER=inner,
        BLOCK_T=block_rows,
        BLOCK_N=block_columns,
        BLOCK_K=depth,
        num_warps=4,
        num_stages=2,
    )


def attend_latents(
    q_latent_TAR: torch.Tensor,
    q_rotated_TAW: torch.Tensor,
    cache: LatentCache,
    paging: Paging,
    partials: Partials,
    sum_TAR: torch.Tensor,
    *,
    scale: float,
    chosen: SelectedPositions | None = None,
    tile: LatentTile = LATENT_TILE,
) -> None:
    """Each row attends to all positions up to its own, or only to the `chosen` ones. Rows without a
    token give zeros. A launch computes as many rows as `partials` has space for."""
    rows, heads, rank = q_latent_TAR.shape
    at_once, _, splits_max = partials.maximum_TQX.shape
    block_tokens = cache.latent_BUR.shape[1]
    context = paging.tables_SB.shape[1] * block_tokens
    top_k = 0 if chosen is None else chosen.cached_TK.shape[1]
    doublings = _doublings(min(context, top_k or context))
    for first in range(0, rows, at_once):
        part = slice(first, min(first + at_once, rows))
        last_T = paging.position_T[part] if chosen is None else chosen.last_T[part]
        num_rows, blocks = last_T.shape[0], triton.cdiv(heads, tile.heads)
        side_by_side = max(1, min(splits_max, tile.programs // (num_rows * blocks)))
        _attend_latents[(num_rows, blocks, side_by_side)](
            q_latent_TAR[part],
            q_rotated_TAW[part],
            *cache,
            last_T,
            paging.sequence_T[part],
            paging.tables_SB if chosen is None else chosen.cached_TK[part],
            *partials,
            scale * _LOG2_E,
            paging.tables_SB.shape[1],
            splits_max,
            HEADS=heads,
            RANK=rank,
            ROTATED=q_rotated_TAW.shape[2],
            BLOCK_A=tile.heads,
            STEP=tile.step_tokens,
            SPLIT=SPLIT_TOKENS,
            SPLITS_MAX=SPLITS_MAX,
            DOUBLINGS=doublings,
            BLOCK_TOKENS=block_tokens,
            TOP_K=top_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        merge_splits(
            partials,
            last_T,
            sum_TAR[part],
            split_tokens=SPLIT_TOKENS,
            warps=4,
            doublings=doublings,
        )


def num_splits(context_tokens: int) -> int:
    """The number of splits of a row with `context_tokens` positions, at most."""
    return min(SPLITS_MAX, -(-context_tokens // SPLIT_TOKENS))


def _doublings(context_tokens: int) -> int:
    """How often `split_size` doubles the split of the last of so many positions."""
    doublings = 0
    while (context_tokens - 1) // (SPLIT_TOKENS << doublings) >= SPLITS_MAX:
        doublings += 1
    return doublings


@triton.jit
def _pair_columns(i, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(low, high) element of pair i."""
    if INTERLEAVED:
        low = 2 * i
        high = 2 * i + 1
    else:
        low = i
        high = i + HALF
    return low, high


@triton.jit
def _store_rotated(out_ptrs, low, high, cos, sin, mask, HALF: tl.constexpr):
    """Rotates pairs by their angles; the high elements go `HALF` behind the low ones."""
    dtype: tl.constexpr = out_ptrs.dtype.element_ty
    tl.store(out_ptrs, (low * cos - high * sin).to(dtype), mask=mask)
    tl.store(out_ptrs + HALF, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["part_stride", "table_width"])
def _norm_and_store(
    in_ptr,
    q_norm_ptr,
    kv_norm_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    sequence_ptr,
    tables_ptr,
    q_ptr,
    latent_ptr,
    key_ptr,
    eps,
    part_stride,
    table_width,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    Q_RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    row_ptr = in_ptr + row * COLUMNS
    if tl.program_id(1) == 0:
        if position >= 0:
            r = tl.arange(0, RANK)
            i = tl.arange(0, HALF)
            low_at, high_at = _pair_columns(i, HALF, INTERLEAVED)
            latent = tl.zeros([RANK], dtype=tl.float32)
            low = tl.zeros([HALF], dtype=tl.float32)
            high = tl.zeros([HALF], dtype=tl.float32)
            for part in tl.static_range(PARTS):
                ptr = row_ptr + part * part_stride.to(tl.int64) + COLUMNS - RANK - 2 * HALF
                latent += tl.load(ptr + r).to(tl.float32)
                low += tl.load(ptr + RANK + low_at).to(tl.float32)
                high += tl.load(ptr + RANK + high_at).to(tl.float32)
            scale = tl.rsqrt(tl.sum(latent * latent, axis=0) / RANK + eps)
            latent = latent * scale * tl.load(kv_norm_ptr + r).to(tl.float32)
            cos = tl.load(cos_ptr + position * HALF + i)
            sin = tl.load(sin_ptr + position * HALF + i)
            sequence = tl.load(sequence_ptr + row)
            cached = cache_row(tables_ptr, sequence, position, 0, table_width, 1, BLOCK_TOKENS)
            latent = to_cached(latent, latent_ptr.dtype.element_ty)
            tl.store(latent_ptr + cached * RANK + r, latent)
            key = key_ptr + cached * (2 * HALF) + i
            _store_rotated(key, low, high, cos, sin, True, HALF)
    else:
        m = tl.arange(0, BLOCK_M)
        mask = m < Q_RANK
        q = tl.zeros([BLOCK_M], dtype=tl.float32)
        q = add_parts_onto(q, row_ptr, m, part_stride, mask, PARTS)
        scale = tl.rsqrt(tl.sum(q * q, axis=0) / Q_RANK + eps)
        q = q * scale * tl.load(q_norm_ptr + m, mask=mask, other=0.0).to(tl.float32)
        tl.store(q_ptr + row * Q_RANK + m, q.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["part_stride"])
def _rotate_queries(
    q_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    out_ptr,
    part_stride,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_A: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    if position >= 0:
        a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
        i = tl.arange(0, HALF)
        low_at, high_at = _pair_columns(i, HALF, INTERLEAVED)
        is_head = a[:, None] < HEADS
        heads_ptr = q_ptr + row * COLUMNS + FIRST + a[:, None] * STRIDE
        low, high = sum_pairs(
            heads_ptr, part_stride, low_at, high_at, is_head, PARTS, BLOCK_A, HALF
        )
        cos = tl.load(cos_ptr + position * HALF + i)[None, :]
        sin = tl.load(sin_ptr + position * HALF + i)[None, :]
        out = out_ptr + (row * HEADS + a[:, None]) * (2 * HALF) + i[None, :]
        _store_rotated(out, low, high, cos, sin, is_head, HALF)


@triton.jit(do_not_specialize=["num_rows", "part_stride"])
def _multiply_heads(
    x_ptr,
    w_ptr,
    out_ptr,
    num_rows,
    part_stride,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    is_row = t[:, None] < num_rows
    w_ptrs = w_ptr + (head * SIZE + n[:, None]) * INNER + k[None, :]
    x_ptrs = x_ptr + t[:, None].to(tl.int64) * COLUMNS + FIRST + head * STRIDE + k[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for start in range(0, INNER, BLOCK_K):
        w = tl.load(w_ptrs + start)
        x = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
        for part in tl.static_range(PARTS):
            ptr = x_ptrs + part * part_stride.to(tl.int64) + start
            x += tl.load(ptr, mask=is_row, other=0.0).to(tl.float32)
        acc = tl.dot(x.to(w.dtype), w.T, acc)
    out = out_ptr + (t[:, None].to(tl.int64) * HEADS + head) * SIZE + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["table_width", "splits_max"])
def _attend_latents(
    q_latent_ptr,
    q_rotated_ptr,
    latent_ptr,
    key_ptr,
    last_ptr,
    sequence_ptr,
    cached_ptr,
    values_ptr,
    maximum_ptr,
    sum_ptr,
    scale,
    table_width,
    splits_max,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_A: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS_MAX: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Computes each split by itself in steps of STEP positions, so it does not matter which program
    does it. The first position of a step always counts, so its maximum is finite. `cached_ptr`
    holds the cache rows of each row's TOP_K positions, or the block tables if TOP_K is 0."""
    row = tl.program_id(0)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    r = tl.arange(0, RANK)
    w = tl.arange(0, ROTATED)
    n = tl.arange(0, STEP)
    is_head = a < HEADS
    last = tl.load(last_ptr + row)
    sequence = tl.load(sequence_ptr + row)
    if last >= 0:
        head = row.to(tl.int64) * HEADS + a
        q_mask = is_head[:, None]
        q = tl.load(q_latent_ptr + head[:, None] * RANK + r[None, :], mask=q_mask, other=0.0)
        q_rotated = tl.load(
            q_rotated_ptr + head[:, None] * ROTATED + w[None, :], mask=q_mask, other=0.0
        )
        size = split_size(last, SPLIT, SPLITS_MAX, DOUBLINGS)
        for split in range(tl.program_id(2), last // size + 1, tl.num_programs(2)):
            peak = tl.full([BLOCK_A], float("-inf"), dtype=tl.float32)
            total = tl.zeros([BLOCK_A], dtype=tl.float32)
            values = tl.zeros([BLOCK_A, RANK], dtype=tl.float32)
            end = tl.minimum(last + 1, (split + 1) * size)
            for start in range(split * size, end, STEP):
                at = start + n
                is_past = at <= last
                if TOP_K:
                    cached = tl.load(cached_ptr + row * TOP_K + at, mask=is_past, other=0)
                else:
                    table_ptr = cached_ptr + sequence * table_width
                    cached = cache_rows(table_ptr, at, is_past, 0, 1, BLOCK_TOKENS)
                latent = tl.load(
                    latent_ptr + cached[:, None] * RANK + r[None, :],
                    mask=is_past[:, None],
                    other=0.0,
                ).to(q.dtype)
                key = tl.load(
                    key_ptr + cached[:, None] * ROTATED + w[None, :],
                    mask=is_past[:, None],
                    other=0.0,
                )
                scores = tl.dot(q, latent.T)
                scores = tl.dot(q_rotated, key.T, scores) * scale
                scores = tl.where(is_past[None, :], scores, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, axis=1))
                keep = tl.exp2(peak - new_peak)
                p = tl.exp2(scores - new_peak[:, None])
                total = total * keep + tl.sum(p, axis=1)
                values = tl.dot(p.to(latent.dtype), latent, values * keep[:, None])
                peak = new_peak
            out = head * splits_max + split
            store_partials(
                values_ptr, maximum_ptr, sum_ptr, out, values, peak, total, is_head, RANK
            )
