"""A token's logits and KV have the same bits whatever else is in the batch, however a prefill is
cut, whichever blocks hold the cache, and wherever the experts are; in every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.unit.gpu_worker.cpu.reference import VOCAB, save_checkpoint
from tests.unit.gpu_worker.cpu.runs import (
    Chunk,
    RankRun,
    make_batch,
    open_ranks,
    step_together,
)

LENGTH = 24
BLOCKS = LENGTH // 4
WAYS = (
    "qwen3_moe",
    "deepseek_v2_lite",
    "deepseek_v3_yarn",
    "deepseek_v32",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
)
"""Families that between them take every way through the kernels."""


@pytest.fixture(scope="module", params=WAYS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def run(folder: Path) -> RankRun:
    return open_ranks(folder, 1)[0]


def sequence(seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, LENGTH).astype(np.int32)


def table_of(index: int) -> list[int]:
    """Blocks of the sequence at this index of a batch; neighbours' are interleaved."""
    return [index + 8 * n for n in range(BLOCKS)]


def kv_of(run: RankRun, table: list[int]) -> Iterator[NDArray[np.float32]]:
    for attention in run.model.attention:
        for cache in attention.cache_arrays():
            yield cache[table]


def alone(run: RankRun, seed: int) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
    """One whole prefill, nothing beside it."""
    logits_TV = run.logits(Chunk(sequence(seed), 0, table_of(0)))
    return logits_TV, [part.copy() for part in kv_of(run, table_of(0))]


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_batch_and_chunking_change_no_bit(run: RankRun, data: st.DataObject) -> None:
    """Up to seven sequences advance by random chunks, in random order, in shared steps."""
    seeds = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=7))
    done = [0] * len(seeds)
    logits: list[list[NDArray[np.float32]]] = [[] for _ in seeds]
    while min(done) < LENGTH:
        behind = [i for i in range(len(seeds)) if done[i] < LENGTH]
        chosen = data.draw(st.lists(st.sampled_from(behind), min_size=1, unique=True))
        sizes = [data.draw(st.integers(1, LENGTH - done[i])) for i in chosen]
        chunks = [
            Chunk(sequence(seeds[i])[done[i] : done[i] + n], done[i], table_of(i))
            for i, n in zip(chosen, sizes, strict=True)
        ]
        rows = np.split(run.logits(*chunks), np.cumsum(sizes)[:-1])
        for i, n, part in zip(chosen, sizes, rows, strict=True):
            logits[i].append(part)
            done[i] += n
    kv = [[part.copy() for part in kv_of(run, table_of(i))] for i in range(len(seeds))]
    for seed, parts, caches in zip(seeds, logits, kv, strict=True):
        expected_TV, expected = alone(run, seed)
        assert np.array_equal(np.concatenate(parts), expected_TV)
        assert all(
            np.array_equal(ours, theirs) for ours, theirs in zip(caches, expected, strict=True)
        )


def test_a_prefill_of_emitted_tokens_gives_the_bits_that_decode_gave(run: RankRun) -> None:
    prompt = sequence(1)[:5].tolist()
    emitted = run.greedy(prompt, table_of(0), LENGTH - 5 + 1)
    decoded = [part.copy() for part in kv_of(run, table_of(0))]
    logits_TV = run.logits(Chunk(prompt + emitted[:-1], 0, table_of(1)))
    assert logits_TV[4:].argmax(axis=1).tolist() == emitted
    for part, expected in zip(kv_of(run, table_of(1)), decoded, strict=True):
        assert np.array_equal(part, expected)


def test_a_replayed_step_writes_the_same_values(run: RankRun) -> None:
    chunk = Chunk(sequence(2)[:9], 0, table_of(0))
    first = run.logits(chunk)
    cache = [part.copy() for part in kv_of(run, table_of(0))]
    assert np.array_equal(run.logits(chunk), first)
    for part, expected in zip(kv_of(run, table_of(0)), cache, strict=True):
        assert np.array_equal(part, expected)


def test_stale_contents_of_a_block_change_no_bit(run: RankRun) -> None:
    expected_TV, _ = alone(run, 3)
    for attention in run.model.attention:
        for cache in attention.cache_arrays():
            cache[:] = 1e3
    again_TV, _ = alone(run, 3)
    assert np.array_equal(again_TV, expected_TV)


def test_what_fresh_memory_holds_changes_no_bit(
    run: RankRun, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch memory is allocated as it comes. Here it comes full of what spreads."""
    expected_TV, expected = alone(run, 5)
    monkeypatch.setattr(np, "empty", poisoned)
    (other,) = open_ranks(folder, 1)
    logits_TV, caches = alone(other, 5)
    assert np.array_equal(logits_TV, expected_TV)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(caches, expected, strict=True))


def poisoned(shape: int | tuple[int, ...], dtype: type = float) -> NDArray[np.generic]:
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 1, dtype=dtype)


@pytest.mark.parametrize("block_tokens", [1, 3, 16, 24])
def test_the_size_of_blocks_changes_no_bit(run: RankRun, folder: Path, block_tokens: int) -> None:
    expected_TV, _ = alone(run, 4)
    (other,) = open_ranks(folder, 1, block_tokens=block_tokens)
    table = list(range(-(-LENGTH // block_tokens)))[::-1]
    assert np.array_equal(other.logits(Chunk(sequence(4), 0, table)), expected_TV)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_place_of_experts_and_other_ranks_tokens_change_no_bit(
    run: RankRun, folder: Path, num_ranks: int
) -> None:
    runs = open_ranks(folder, num_ranks)
    batches = [make_batch([Chunk(sequence(r), 0, table_of(0))]) for r in range(num_ranks)]
    for seed, forward in enumerate(step_together(runs, batches)):
        assert np.array_equal(forward.logits_RV, alone(run, seed)[0])
