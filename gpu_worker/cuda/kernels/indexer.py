"""The lightning indexer of DeepSeek-V3.2: writes its keys into their paged cache, scores every
earlier position of a row, and selects the cache rows of the K positions that score highest.

A score is `Σ_y weight_y · relu(q_y · key)`. Only rows whose position is K or more have to select;
the others see all their positions. Each row is scored by itself, in tiles of one shape. More shape
letters: Y heads of the indexer, Z the size of each, C positions of the context, K positions that a
row may see, M rank of the queries' latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.latent import Rotation, SelectedPositions
from gpu_worker.cuda.kernels.paging import Paging, cache_row, cache_rows
from gpu_worker.cuda.kernels.summed_parts import sum_pairs

_HEADS_AT_ONCE = 16
_DIGIT_BITS = 8
_CHOICE_TOKENS = 4096
_CHOICE_WARPS = 8


class ScoreTile(NamedTuple):
    """Launch parameters: positions of a dot product, and more. All but `stages` and `programs`
    change the bits of the result."""

    step_tokens: int
    warps: int
    stages: int
    programs: int


SCORE_TILE = ScoreTile(step_tokens=64, warps=4, stages=2, programs=1024)


def norm_and_store_keys(
    in_PTC: torch.Tensor,
    norm_Z: torch.Tensor,
    bias_Z: torch.Tensor,
    rotation: Rotation,
    paging: Paging,
    key_BUZ: torch.Tensor,
    weight_TY: torch.Tensor,
    *,
    eps: float,
) -> None:
    """Processes the columns of `in_PTC`: the key, then one weight per head. Keys of rows with a
    token get a layer norm, their first elements are rotated by halves, and they go into the cache.
    Weights are multiplied by the scale of the scores and go into `weight_TY` (float32)."""
    parts, rows, columns = in_PTC.shape
    _, block_tokens, size = key_BUZ.shape
    heads = weight_TY.shape[1]
    _norm_and_store_keys[(rows,)](
        in_PTC,
        norm_Z,
        bias_Z,
        rotation.cos_CD,
        rotation.sin_CD,
        paging.position_T,
        paging.sequence_T,
        paging.tables_SB,
        key_BUZ,
        weight_TY,
        eps,
        (heads * size) ** -0.5,
        rows * columns,
        paging.tables_SB.shape[1],
        PARTS=parts,
        COLUMNS=columns,
        SIZE=size,
        HEADS=heads,
        BLOCK_Y=triton.next_power_of_2(heads),
        HALF=rotation.cos_CD.shape[1],
        BLOCK_TOKENS=block_tokens,
        num_warps=4,
    )


def rotate_index_queries(
    q_PTN: torch.Tensor,
    rotation: Rotation,
    position_T: torch.Tensor,
    q_TYZ: torch.Tensor,
    *,
    top_k: int,
) -> None:
    """Writes the queries of rows that have to select, with their first elements rotated by
    halves."""
    parts, rows, columns = q_PTN.shape
    _, heads, size = q_TYZ.shape
    _rotate_index_queries[(rows, triton.cdiv(heads, _HEADS_AT_ONCE))](
        q_PTN,
        rotation.cos_CD,
        rotation.sin_CD,
        position_T,
        q_TYZ,
        rows * columns,
        PARTS=parts,
        HEADS=heads,
        SIZE=size,
        HALF=rotation.cos_CD.shape[1],
        BLOCK_Y=_HEADS_AT_ONCE,
        TOP_K=top_k,
        num_warps=4,
    )


def score_positions(
    q_TYZ: torch.Tensor,
    weight_TY: torch.Tensor,
    key_BUZ: torch.Tensor,
    paging: Paging,
    score_TC: torch.Tensor,
    *,
    top_k: int,
    tile: ScoreTile = SCORE_TILE,
) -> None:
    """Writes the scores (float32) of rows that have to select, for all positions up to their
    own."""
    rows, heads, size = q_TYZ.shape
    context = score_TC.shape[1]
    steps_max = triton.cdiv(context, tile.step_tokens)
    _score_positions[(rows, max(1, min(steps_max, tile.programs // rows)))](
        q_TYZ,
        weight_TY,
        key_BUZ,
        paging.position_T,
        paging.sequence_T,
        paging.tables_SB,
        score_TC,
        paging.tables_SB.shape[1],
        context,
        HEADS=heads,
        SIZE=size,
        BLOCK_Y=max(16, triton.next_power_of_2(heads)),
        STEP=tile.step_tokens,
        BLOCK_TOKENS=key_BUZ.shape[1],
        TOP_K=top_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def select_positions(
    score_TC: torch.Tensor, paging: Paging, chosen: SelectedPositions, *, block_tokens: int
) -> None:
    """Selects the K positions with the highest scores; of equal ones, the lower positions. Writes
    their cache rows by rising position. Rows with at most K positions get all of them."""
    _select_positions[(paging.position_T.shape[0],)](
        score_TC,
        paging.position_T,
        paging.sequence_T,
        paging.tables_SB,
        *chosen,
        score_TC.shape[1],
        paging.tables_SB.shape[1],
        TOP_K=chosen.cached_TK.shape[1],
        BLOCK_TOKENS=block_tokens,
        BLOCK_C=_CHOICE_TOKENS,
        BITS=_DIGIT_BITS,
        num_warps=_CHOICE_WARPS,
    )


@triton.jit
def _partner(z, HALF: tl.constexpr):
    """The element that z is rotated with; z itself if it is not rotated."""
    return tl.where(z < HALF, z + HALF, tl.where(z < 2 * HALF, z - HALF, z))


@triton.jit
def _load_angles(cos_ptr, sin_ptr, position, z, HALF: tl.constexpr):
    """(cosine, sine) for each element. The sine has the sign for the element's partner."""
    at = position * HALF + z % HALF
    cos = tl.load(cos_ptr + at, mask=z < 2 * HALF, other=1.0)
    sin = tl.load(sin_ptr + at, mask=z < 2 * HALF, other=0.0)
    return cos, tl.where(z < HALF, -sin, sin)


@triton.jit(do_not_specialize=["part_stride", "table_width"])
def _norm_and_store_keys(
    in_ptr,
    norm_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    sequence_ptr,
    tables_ptr,
    key_ptr,
    weight_ptr,
    eps,
    factor,
    part_stride,
    table_width,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    if position >= 0:
        z = tl.arange(0, SIZE)
        y = tl.arange(0, BLOCK_Y)
        is_head = y < HEADS
        partner_at = _partner(z, HALF)
        key = tl.zeros([SIZE], dtype=tl.float32)
        partner = tl.zeros([SIZE], dtype=tl.float32)
        weight = tl.zeros([BLOCK_Y], dtype=tl.float32)
        for part in tl.static_range(PARTS):
            ptr = in_ptr + row * COLUMNS + part * part_stride.to(tl.int64)
            key += tl.load(ptr + z).to(tl.float32)
            partner += tl.load(ptr + partner_at).to(tl.float32)
            weight += tl.load(ptr + SIZE + y, mask=is_head, other=0.0).to(tl.float32)
        mean = tl.sum(key, axis=0) / SIZE
        scale = tl.rsqrt(tl.sum((key - mean) * (key - mean), axis=0) / SIZE + eps)
        norm = tl.load(norm_ptr + z).to(tl.float32)
        partner_norm = tl.load(norm_ptr + partner_at).to(tl.float32)
        key = (key - mean) * scale * norm + tl.load(bias_ptr + z).to(tl.float32)
        partner = (partner - mean) * scale * partner_norm
        partner += tl.load(bias_ptr + partner_at).to(tl.float32)
        cos, sin = _load_angles(cos_ptr, sin_ptr, position, z, HALF)
        sequence = tl.load(sequence_ptr + row)
        cached = cache_row(tables_ptr, sequence, position, 0, table_width, 1, BLOCK_TOKENS)
        rotated = (key * cos + partner * sin).to(key_ptr.dtype.element_ty)
        tl.store(key_ptr + cached * SIZE + z, rotated)
        tl.store(weight_ptr + row * HEADS + y, weight * factor, mask=is_head)


@triton.jit(do_not_specialize=["part_stride"])
def _rotate_index_queries(
    q_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    out_ptr,
    part_stride,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    TOP_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    if position >= TOP_K:
        y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
        z = tl.arange(0, SIZE)
        is_head = y[:, None] < HEADS
        partner_at = _partner(z, HALF)
        head = (row * HEADS + y[:, None]) * SIZE
        q, partner = sum_pairs(
            q_ptr + head, part_stride, z, partner_at, is_head, PARTS, BLOCK_Y, SIZE
        )
        cos, sin = _load_angles(cos_ptr, sin_ptr, position, z, HALF)
        rotated = q * cos[None, :] + partner * sin[None, :]
        tl.store(out_ptr + head + z[None, :], rotated.to(out_ptr.dtype.element_ty), mask=is_head)


@triton.jit(do_not_specialize=["table_width", "context"])
def _score_positions(
    q_ptr,
    weight_ptr,
    key_ptr,
    position_ptr,
    sequence_ptr,
    tables_ptr,
    score_ptr,
    table_width,
    context,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Works in steps of STEP positions; it does not matter which program does a step."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    if position >= TOP_K:
        y = tl.arange(0, BLOCK_Y)
        z = tl.arange(0, SIZE)
        n = tl.arange(0, STEP)
        is_head = y < HEADS
        head = row * HEADS + y
        q = tl.load(q_ptr + head[:, None] * SIZE + z[None, :], mask=is_head[:, None], other=0.0)
        weight = tl.load(weight_ptr + head, mask=is_head, other=0.0)
        sequence = tl.load(sequence_ptr + row)
        for step in range(tl.program_id(1), position // STEP + 1, tl.num_programs(1)):
            at = step * STEP + n
            is_past = at <= position
            table_ptr = tables_ptr + sequence * table_width
            cached = cache_rows(table_ptr, at, is_past, 0, 1, BLOCK_TOKENS)
            key = tl.load(
                key_ptr + cached[:, None] * SIZE + z[None, :], mask=is_past[:, None], other=0.0
            )
            dots = tl.maximum(tl.dot(key, q.T), 0.0)
            score = tl.sum(dots * weight[None, :], axis=1)
            tl.store(score_ptr + row * context + at, score, mask=is_past)


@triton.jit
def _load_sort_keys(score_ptr, at, is_past):
    """Unsigned integers that sort as the scores do; both zeros are equal."""
    score = tl.load(score_ptr + at, mask=is_past, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)


@triton.jit(do_not_specialize=["context", "table_width"])
def _select_positions(
    score_ptr,
    position_ptr,
    sequence_ptr,
    tables_ptr,
    cached_ptr,
    last_ptr,
    context,
    table_width,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BITS: tl.constexpr,
):
    """Finds the K-th highest score digit by digit, by counting the scores that share the digits
    before. Then takes all scores above it, and as many equal ones as are still wanted."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + row)
    sequence = tl.load(sequence_ptr + row)
    n = tl.arange(0, BLOCK_C)
    b = tl.arange(0, 1 << BITS)
    table_ptr = tables_ptr + sequence * table_width
    row_ptr = cached_ptr + row * TOP_K
    score_ptr += row * context
    tl.store(last_ptr + row, tl.minimum(position, TOP_K - 1))
    if position < TOP_K:
        for start in range(0, position + 1, BLOCK_C):
            at = start + n
            is_past = at <= position
            cached = cache_rows(table_ptr, at, is_past, 0, 1, BLOCK_TOKENS)
            tl.store(row_ptr + at, cached, mask=is_past)
    else:
        edge = tl.full([], 0, dtype=tl.uint32)
        wanted = tl.full([], TOP_K, dtype=tl.int32)
        shift = tl.full([], 32, dtype=tl.uint32)
        for _ in range(32 // BITS):
            shift -= BITS
            counts = tl.zeros([1 << BITS], dtype=tl.int32)
            for start in range(0, position + 1, BLOCK_C):
                at = start + n
                rank = _load_sort_keys(score_ptr, at, at <= position) >> shift
                among = (at <= position) & (rank >> BITS == edge)
                own = (rank & ((1 << BITS) - 1)).to(tl.int32)
                counts += tl.histogram(own, 1 << BITS, mask=among)
            at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
            chosen = tl.max(tl.where(at_least >= wanted, b, 0), axis=0)
            wanted -= tl.sum(tl.where(b > chosen, counts, 0), axis=0)
            edge = (edge << BITS) | chosen.to(tl.uint32)
        num_above = tl.full([], 0, dtype=tl.int32)
        num_equal = tl.full([], 0, dtype=tl.int32)
        for start in range(0, position + 1, BLOCK_C):
            at = start + n
            is_past = at <= position
            rank = _load_sort_keys(score_ptr, at, is_past)
            above = (is_past & (rank > edge)).to(tl.int32)
            equal = (is_past & (rank == edge)).to(tl.int32)
            above_yet = num_above + tl.cumsum(above, axis=0)
            equal_yet = num_equal + tl.cumsum(equal, axis=0)
            taken = (above == 1) | ((equal == 1) & (equal_yet <= wanted))
            cached = cache_rows(table_ptr, at, taken, 0, 1, BLOCK_TOKENS)
            out = row_ptr + above_yet + tl.minimum(equal_yet, wanted) - 1
            tl.store(out, cached, mask=taken)
            num_above += tl.sum(above, axis=0)
            num_equal += tl.sum(equal, axis=0)
