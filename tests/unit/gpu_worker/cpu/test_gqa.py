"""Attention over a paged cache: what a row gets hangs neither on the rows that attend with it, nor
on the size of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.cpu.kernels import gqa

LENGTH, KV_HEADS, GROUP = 150, 2, 3
EMPTY = np.zeros(0, dtype=np.float32)


def read_only(array: np.ndarray) -> np.ndarray:
    """As the engine hands it over: the kernel is compiled for that, not for another one."""
    array.flags.writeable = False
    return array


def attend(
    block_tokens: int, head_size: int, cuts: list[int], window: int, sinks: np.ndarray
) -> np.ndarray:
    """A prompt of LENGTH tokens, its last ones in pieces that end at `cuts`."""
    rng = np.random.default_rng(head_size)
    num_heads = GROUP * KV_HEADS
    qkv = rng.standard_normal((LENGTH, (num_heads + 2 * KV_HEADS) * head_size), dtype=np.float32)
    keys, values = rng.standard_normal((2, LENGTH, KV_HEADS, head_size), dtype=np.float32)
    num_blocks = -(-LENGTH // block_tokens)
    table = np.random.default_rng(1).permutation(num_blocks).astype(np.int32)
    k_cache = np.full((num_blocks, KV_HEADS, head_size, block_tokens), 7, dtype=np.float32)
    v_cache = np.full((num_blocks, KV_HEADS, block_tokens, head_size), 7, dtype=np.float32)
    for position in range(LENGTH):
        block, offset = table[position // block_tokens], position % block_tokens
        k_cache[block, :, :, offset] = keys[position]
        v_cache[block, :, offset] = values[position]
    out = np.full((LENGTH, num_heads * head_size), np.nan, dtype=np.float32)
    scores = np.full((GROUP * 4, LENGTH + block_tokens), np.nan, dtype=np.float32)
    for first, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        gqa.attend_rows(
            qkv[first:end],
            read_only(np.arange(first, end, dtype=np.int32)),
            read_only(np.zeros(end - first, dtype=np.int32)),
            read_only(table[None]),
            k_cache,
            v_cache,
            window,
            sinks,
            np.float32(head_size**-0.5),
            scores,
            out[first:end],
        )
    return out


def expected(head_size: int, window: int, sinks: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(head_size)
    num_heads = GROUP * KV_HEADS
    qkv = rng.standard_normal((LENGTH, (num_heads + 2 * KV_HEADS) * head_size), dtype=np.float32)
    keys, values = rng.standard_normal((2, LENGTH, KV_HEADS, head_size), dtype=np.float32)
    queries = qkv[:, : num_heads * head_size].reshape(LENGTH, num_heads, head_size)
    out = np.empty((LENGTH, num_heads, head_size))
    for t in range(LENGTH):
        begin = max(0, t + 1 - window) if window else 0
        for head in range(num_heads):
            seen = slice(begin, t + 1)
            kv_head = head // GROUP
            scores = keys[seen, kv_head].astype(np.float64) @ queries[t, head] * head_size**-0.5
            sink = np.exp(sinks[head]) if sinks.size else 0.0
            weights = np.exp(scores) / (np.exp(scores).sum() + sink)
            out[t, head] = weights @ values[seen, kv_head]
    return out.reshape(LENGTH, -1)


@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("head_size", [10, 32, 80])
@pytest.mark.parametrize("block_tokens", [5, 16, 64])
def test_rows_attend_to_what_they_see(
    block_tokens: int, head_size: int, has_sinks: bool, window: int
) -> None:
    sinks = np.linspace(-1, 1, GROUP * KV_HEADS, dtype=np.float32) if has_sinks else EMPTY
    out = attend(block_tokens, head_size, [], window, sinks)
    np.testing.assert_allclose(out, expected(head_size, window, sinks), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=30)
@given(
    block_tokens=st.sampled_from([3, 16, 32]),
    head_size=st.sampled_from([10, 64, 80]),
    cuts=st.lists(st.integers(1, LENGTH - 1), unique=True, max_size=12).map(sorted),
    window=st.sampled_from([0, 1, 17, 64]),
)
def test_neither_pieces_nor_the_size_of_blocks_change_a_bit(
    block_tokens: int, head_size: int, cuts: list[int], window: int
) -> None:
    sinks = np.linspace(-1, 1, GROUP * KV_HEADS, dtype=np.float32)
    out = attend(block_tokens, head_size, cuts, window, sinks)
    alone = attend(16, head_size, list(range(1, LENGTH)), window, sinks)
    assert np.array_equal(out, alone)
