"""A block's content is copied from all caches into another block of other caches, byte for byte,
and nothing else changes. Runs on the CPU, because the class works on any device; `tests/gpu` tests
it with streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.cuda.block_cache import CudaBlockCache

PAGE_BYTES = 4096
GQA = ((2, 16, 32), (2, 16, 32))
LATENT = ((16, 32), (16, 16))
INDEXED = (*LATENT, (16, 64))
DTYPES = (torch.float32, torch.bfloat16)


def make_caches(
    forms: tuple[tuple[int, ...], ...], dtype: torch.dtype, *, num_blocks: int = 6, seed: int = 0
) -> list[Tensor]:
    """Caches of three layers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, num_blocks, *form, generator=generator).to(dtype) for form in forms]


def open_cache(caches: list[Tensor]) -> CudaBlockCache:
    return CudaBlockCache(caches, architecture="Some", num_staging_buffers=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", [GQA, LATENT, INDEXED], ids=["gqa", "latent", "indexed"])
def test_contents_travel_to_other_blocks_and_touch_no_third(
    forms: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> None:
    source = make_caches(forms, dtype)
    target = make_caches(forms, dtype, num_blocks=9, seed=1)
    expected = [cache.clone() for cache in target]
    moves = {4: 0, 0: 7, 1: 8, 5: 3, 2: 4}
    saver, loader = open_cache(source), open_cache(target)
    staging_buffers = {block: saver.staging_buffer() for block in moves}
    for block, other in moves.items():
        assert saver.save(block, staging_buffers[block])()
        loader.load(other, staging_buffers[block])
        for cache, values in zip(expected, source, strict=True):
            cache[:, other] = values[:, block]
    for cache, wanted in zip(target, expected, strict=True):
        assert torch.equal(cache, wanted)


def test_a_copy_is_of_the_moment_of_its_call() -> None:
    source, target = make_caches(GQA, torch.bfloat16), make_caches(GQA, torch.bfloat16, seed=1)
    wanted = [cache[:, 2].clone() for cache in source]
    saver, loader = open_cache(source), open_cache(target)
    staging_buffer = saver.staging_buffer()
    saver.save(2, staging_buffer)
    for cache in source:
        cache.zero_()
    content = staging_buffer.copy()
    content.setflags(write=False)
    loader.load(5, content)
    staging_buffer.fill(0)
    assert all(torch.equal(t[:, 5], w) for t, w in zip(target, wanted, strict=True))


def test_staging_buffers_are_whole_pages_of_their_own() -> None:
    cache = open_cache(make_caches(INDEXED, torch.bfloat16))
    assert cache.block_bytes == 3 * 16 * (32 + 16 + 64) * 2
    first, second = cache.staging_buffer(), cache.staging_buffer()
    assert (first.dtype, first.shape) == (np.uint8, (cache.block_bytes,))
    assert {staging_buffer.ctypes.data % PAGE_BYTES for staging_buffer in (first, second)} == {0}
    assert not np.shares_memory(first, second)


def test_a_layout_says_how_bytes_are_read_and_not_how_many_blocks_there_are() -> None:
    caches = make_caches(LATENT, torch.bfloat16)
    layout = open_cache(caches).layout
    assert open_cache(make_caches(LATENT, torch.bfloat16, num_blocks=99)).layout == layout
    others = {
        CudaBlockCache(caches, architecture="Other").layout,
        open_cache(make_caches(LATENT, torch.float16)).layout,
        open_cache(make_caches(INDEXED, torch.bfloat16)).layout,
        open_cache(caches[::-1]).layout,
        open_cache([cache[:2] for cache in caches]).layout,
    }
    assert layout not in others
    assert len(others) == 5
