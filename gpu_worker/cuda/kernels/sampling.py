"""Samples token ids from logits on the device: greedy, or by a uniform number that the host derives
from (seed, position). A row's id depends on its own logits and draw alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK_V = 8192
_BISECTIONS = 30


class Draws(NamedTuple):
    """One draw per row. A temperature of 0 means greedy. A top-k of 0 and a top-p of 1 mean all
    tokens. `uniform_T` is in [0, 1). `banned_TX` holds token ids, padded with -1."""

    temperature_T: torch.Tensor
    top_p_T: torch.Tensor
    top_k_T: torch.Tensor
    uniform_T: torch.Tensor
    banned_TX: torch.Tensor


def sample_rows(logits_TV: torch.Tensor, draws: Draws, ids_T: torch.Tensor) -> None:
    """Writes one id per row; -1 if the row has no finite maximum. Tokens that tie at the edge of
    top-k or top-p are all kept."""
    rows, vocab = logits_TV.shape
    _sample_rows[(rows,)](
        logits_TV,
        *draws,
        ids_T,
        VOCAB=vocab,
        BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(vocab)),
        BANNED=draws.banned_TX.shape[1],
        BISECTIONS=_BISECTIONS,
        num_warps=16 if vocab > 4096 else 4,
    )


@triton.jit
def _load(row_ptr, banned_ptr, start, v, VOCAB: tl.constexpr, BANNED: tl.constexpr):
    at = start + v
    x = tl.load(row_ptr + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(BANNED):
        x = tl.where(at == tl.load(banned_ptr + i), float("-inf"), x)
    return x


@triton.jit
def _load_weights(
    row_ptr,
    banned_ptr,
    start,
    v,
    peak,
    temperature,
    VOCAB: tl.constexpr,
    BANNED: tl.constexpr,
):
    """Weights in [0, 1] of the tokens from `start` on."""
    x = _load(row_ptr, banned_ptr, start, v, VOCAB, BANNED)
    return tl.exp((x - peak) / temperature)


@triton.jit
def _sum_from(
    threshold,
    row_ptr,
    banned_ptr,
    peak,
    temperature,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BANNED: tl.constexpr,
):
    """The sum of a row's weights that are at least `threshold`."""
    v = tl.arange(0, BLOCK_V)
    total = 0.0
    for start in range(0, VOCAB, BLOCK_V):
        weight = _load_weights(row_ptr, banned_ptr, start, v, peak, temperature, VOCAB, BANNED)
        total += tl.sum(tl.where(weight >= threshold, weight, 0.0), axis=0)
    return total


@triton.jit
def _sample_rows(
    logits_ptr,
    temperature_ptr,
    top_p_ptr,
    top_k_ptr,
    uniform_ptr,
    banned_ptr,
    ids_ptr,
    VOCAB: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BANNED: tl.constexpr,
    BISECTIONS: tl.constexpr,
):
    """A token's weight is `exp((x - peak) / temperature)`, in [0, 1]. Bisection finds the threshold
    that keeps enough tokens (top-k) or enough of their sum (top-p), without a sort."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    row_ptr = logits_ptr + row * VOCAB
    banned = banned_ptr + row * BANNED
    temperature = tl.load(temperature_ptr + row)
    peak = float("-inf")
    best = -1
    for start in range(0, VOCAB, BLOCK_V):
        x = _load(row_ptr, banned, start, v, VOCAB, BANNED)
        block_peak, index = tl.max(x, axis=0, return_indices=True)
        best = tl.where(block_peak > peak, start + index, best)
        peak = tl.maximum(peak, block_peak)
    is_finite = (peak > float("-inf")) & (peak < float("inf"))
    if (temperature > 0.0) & is_finite:
        top_p = tl.load(top_p_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        low = 0.0
        if (top_k > 0) & (top_k < VOCAB):
            high = 1.0
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                count = 0
                for start in range(0, VOCAB, BLOCK_V):
                    weight = _load_weights(
                        row_ptr, banned, start, v, peak, temperature, VOCAB, BANNED
                    )
                    count += tl.sum((weight >= middle).to(tl.int32), axis=0)
                low = tl.where(count >= top_k, middle, low)
                high = tl.where(count >= top_k, high, middle)
        total = _sum_from(low, row_ptr, banned, peak, temperature, VOCAB, BLOCK_V, BANNED)
        if top_p < 1.0:
            wanted = tl.maximum(top_p, 0.0) * total
            high = 1.0
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                mass = _sum_from(middle, row_ptr, banned, peak, temperature, VOCAB, BLOCK_V, BANNED)
                low = tl.where(mass >= wanted, middle, low)
                high = tl.where(mass >= wanted, high, middle)
            total = _sum_from(low, row_ptr, banned, peak, temperature, VOCAB, BLOCK_V, BANNED)
        goal = tl.load(uniform_ptr + row) * total
        passed = 0.0
        chosen = best
        is_open = True
        for start in range(0, VOCAB, BLOCK_V):
            weight = _load_weights(row_ptr, banned, start, v, peak, temperature, VOCAB, BANNED)
            weight = tl.where(weight >= low, weight, 0.0)
            share = tl.sum(weight, axis=0)
            if is_open & (passed + share > goal):
                # The first token whose weight carries the running sum past the goal.
                running = passed + tl.cumsum(weight, axis=0)
                hit = (running > goal) & (weight > 0.0)
                chosen = start + tl.min(tl.where(hit, v, BLOCK_V - 1), axis=0)
                is_open = False
            passed += share
        best = chosen
    best = tl.where(is_finite, best, -1)
    tl.store(ids_ptr + row, best)
