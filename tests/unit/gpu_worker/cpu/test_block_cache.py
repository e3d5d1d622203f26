"""A block's content travels to another block of another rank's model, in every family; there the
sequence goes on as if it had been computed there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpu_worker.cpu.block_cache import CpuBlockCache
from tests.unit.gpu_worker.cpu.reference import random_tokens, save_checkpoint
from tests.unit.gpu_worker.cpu.runs import Chunk, RankRun, open_ranks
from tests.unit.gpu_worker.cpu.test_batch_invariance import WAYS

TOKENS = random_tokens(15)
KNOWN = 12
HERE = (3, 9, 1, 20)
THERE = (7, 0, 30, 5)
PAGE_BYTES = 4096


@pytest.fixture(scope="module", params=WAYS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def source(folder: Path) -> RankRun:
    return open_ranks(folder, 1)[0]


@pytest.fixture(scope="module")
def target(folder: Path) -> RankRun:
    return open_ranks(folder, 1, kv_blocks=33)[0]


def spoil(run: RankRun) -> None:
    for attention in run.model.attention:
        for cache in attention.cache_arrays():
            cache[:] = 1e3


def test_a_continuation_from_copies_has_the_bits_of_where_they_came_from(
    source: RankRun, target: RankRun
) -> None:
    source.logits(Chunk(TOKENS[:KNOWN], 0, HERE))
    expected = source.logits(Chunk(TOKENS[KNOWN:], KNOWN, HERE))
    spoil(target)
    saver, loader = CpuBlockCache(source.model), CpuBlockCache(target.model)
    for block, other in zip(HERE[: KNOWN // 4], THERE, strict=False):
        staging_buffer = saver.staging_buffer()
        assert saver.save(block, staging_buffer)()
        loader.load(other, staging_buffer)
    assert np.array_equal(target.logits(Chunk(TOKENS[KNOWN:], KNOWN, THERE)), expected)


def test_a_copy_stands_by_itself_and_fills_its_block_alone(
    source: RankRun, target: RankRun
) -> None:
    saver, loader = CpuBlockCache(source.model), CpuBlockCache(target.model)
    source.logits(Chunk(TOKENS, 0, HERE))
    saved, loaded = saver.staging_buffer(), loader.staging_buffer()
    saver.save(HERE[0], saved)
    expected = saved.copy()
    spoil(source)
    assert np.array_equal(saved, expected)
    spoil(target)
    loader.load(THERE[0], saved)
    saved.fill(0)
    loader.save(THERE[0], loaded)
    assert np.array_equal(loaded, expected)
    for attention in target.model.attention:
        for cache in attention.cache_arrays():
            assert np.all(np.delete(cache, THERE[0], axis=0) == 1e3)


def test_staging_buffers_are_whole_pages_of_their_own(source: RankRun) -> None:
    cache = CpuBlockCache(source.model)
    first, second = cache.staging_buffer(), cache.staging_buffer()
    assert (first.dtype, first.shape) == (np.uint8, (cache.block_bytes,))
    assert {staging_buffer.ctypes.data % PAGE_BYTES for staging_buffer in (first, second)} == {0}
    assert not np.shares_memory(first, second)


def test_layouts_agree_whatever_the_number_of_blocks(source: RankRun, target: RankRun) -> None:
    assert CpuBlockCache(source.model).layout == CpuBlockCache(target.model).layout


def test_layouts_of_other_blocks_differ(source: RankRun, folder: Path) -> None:
    (larger,) = open_ranks(folder, 1, block_tokens=8)
    assert CpuBlockCache(source.model).layout != CpuBlockCache(larger.model).layout


def test_layouts_of_other_architectures_differ(source: RankRun, tmp_path: Path) -> None:
    """Though their caches may have the same sizes."""
    name = "qwen3_moe"
    if source.model.spec.architecture == "Qwen3MoeForCausalLM":
        name = "olmoe"
    (other,) = open_ranks(save_checkpoint(tmp_path, name), 1)
    assert CpuBlockCache(source.model).layout != CpuBlockCache(other.model).layout
