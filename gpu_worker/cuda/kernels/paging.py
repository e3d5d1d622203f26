"""The paged KV cache as kernels see it: which sequence a token belongs to, and which row of the
cache holds a position."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Paging(NamedTuple):
    """Positions and block tables of a step's tokens, all int32.

    `position_T` and `sequence_T` are per token; a position of -1 means that the row has no token.
    `tables_SB` holds the blocks of each sequence. `tiles_C2` holds (first token, number of tokens)
    per tile of up to `tile_tokens` tokens; None means that every token is its own tile.
    """

    position_T: torch.Tensor
    sequence_T: torch.Tensor
    tables_SB: torch.Tensor
    tiles_C2: torch.Tensor | None
    tile_tokens: int


@triton.jit
def cache_row(
    tables_ptr,
    sequence,
    position,
    kv_head,
    table_width,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """The row (int64) of one position and KV head in a cache `[blocks, KV_HEADS, BLOCK_TOKENS]`."""
    block = tl.load(tables_ptr + sequence * table_width + position // BLOCK_TOKENS)
    first = (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_TOKENS
    return first + position % BLOCK_TOKENS


@triton.jit
def cache_rows(table_ptr, at, mask, kv_head, KV_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """The rows (int32) of the positions `at` of one sequence, whose block table starts at
    `table_ptr`. Rows outside `mask` are those of block 0.

    32 bits are enough for offsets in one layer's cache of less than 2³¹ values: two million tokens
    of eight heads of 128.
    """
    block = tl.load(table_ptr + at // BLOCK_TOKENS, mask=mask, other=0)
    return (block * KV_HEADS + kv_head) * BLOCK_TOKENS + at % BLOCK_TOKENS
