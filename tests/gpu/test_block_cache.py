"""A decoder that gets the contents of another decoder's KV blocks continues with the same bits. A
copy has the content at the moment of its call, whatever is enqueued before and after it. Runs on a
CUDA device in bf16, with graphs; elsewhere on Triton's interpreter in float32."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, GqaShape  # noqa: E402
from gpu_worker.checkpoint.mla_shape import MlaShape  # noqa: E402
from gpu_worker.checkpoint.rope import Rope  # noqa: E402
from gpu_worker.cuda.block_cache import CudaBlockCache  # noqa: E402
from gpu_worker.cuda.decoder import Decoder, DecoderOptions  # noqa: E402
from gpu_worker.cuda.experts.slots import CudaSlots  # noqa: E402
from gpu_worker.cuda.stages.moe_stage import LocalMoe  # noqa: E402
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes  # noqa: E402
from gpu_worker.cuda.weights.random_weights import random_weights  # noqa: E402
from tests.support.cuda_steps import BLOCK_TOKENS, BLOCKS_EACH, step  # noqa: E402

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
NUM_BLOCKS, NUM_STAGING_BUFFERS = 8 * BLOCKS_EACH, 3
WHILE_CYCLES = 200_000_000
"""Keeps the device busy for about 0.1 s."""

GROUPED = GqaShape(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=QK_NORM_HEAD)
SPARSE = MlaShape(
    hidden_size=64,
    num_heads=2,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=16,
    rank=32,
    q_lora_rank=48,
    interleaved=True,
    num_index_heads=2,
    index_head_dim=32,
    index_top_k=16,
)


def make_decoders(attention: GqaShape | MlaShape) -> list[Decoder]:
    """Two decoders with the same weights."""
    sizes = DecoderSizes(
        num_layers=2,
        hidden_size=64,
        attention=attention,
        rope=Rope(theta=1e4, kind="default", scaling={}, context_tokens_max=128),
        moe_layers=(0, 1),
        num_experts=8,
        top_k=2,
        inner_size=32,
        vocab_size=128,
    )
    torch.manual_seed(0)
    weights = random_weights(sizes, DEVICE, DTYPE, std=0.1)
    slots = CudaSlots(
        num_layers=2,
        slots_per_rank=8,
        hidden_size=64,
        inner_size=32,
        device=DEVICE,
        dtype=DTYPE,
    )
    slots.fill_randomly(8, std=0.1)
    options = DecoderOptions(
        kv_blocks=NUM_BLOCKS,
        block_tokens=BLOCK_TOKENS,
        context_tokens_max=BLOCKS_EACH * BLOCK_TOKENS,
        decode_batch_sizes=(1,),
        prefill_tokens=64,
        prefill_sequences=4,
    )
    decoders = []
    for _ in range(2):
        decoder = Decoder(sizes, weights, LocalMoe(slots, top_k=2, step_tokens_max=64), options)
        decoder.use_slots(np.tile(np.arange(8, dtype=np.int32), (2, 1, 1)))
        if ON_CUDA:
            decoder.capture()
        decoders.append(decoder)
    return decoders


@pytest.mark.parametrize("attention", [GROUPED, SPARSE], ids=["grouped", "sparse latent"])
def test_a_sequence_goes_on_from_copies_as_where_they_came_from(
    attention: GqaShape | MlaShape,
) -> None:
    source, target = make_decoders(attention)
    saver, loader = open_cache(source), open_cache(target)
    tokens = np.random.default_rng(1).integers(0, 128, 3 * BLOCK_TOKENS + 5).tolist()
    known = 3 * BLOCK_TOKENS
    step(source, {0: tokens[:known]}, [0])
    staging_buffers = [saver.staging_buffer() for _ in range(3)]
    saved = [
        saver.save(block, staging_buffer) for block, staging_buffer in enumerate(staging_buffers)
    ]
    expected = go_on(source, 0, tokens, known)
    wait()
    assert all(is_saved() for is_saved in saved)
    for block, staging_buffer in enumerate(staging_buffers):
        loader.load(2 * BLOCKS_EACH + block, staging_buffer)
        staging_buffer.fill(255)
    assert torch.equal(go_on(target, 2, tokens, known), expected)


def open_cache(decoder: Decoder) -> CudaBlockCache:
    return CudaBlockCache(
        decoder.attention.cache(), architecture="Some", num_staging_buffers=NUM_STAGING_BUFFERS
    )


def go_on(decoder: Decoder, sequence: int, tokens: list[int], known: int) -> Tensor:
    """The logits of the remaining tokens as one chunk, then those of one more step."""
    ids, first = step(decoder, {sequence: tokens[known:]}, [known])
    _, second = step(decoder, {sequence: [int(ids[0])]}, [len(tokens)])
    return torch.cat([first, second])


def make_caches() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(3, 9, 16, n, device=DEVICE).to(DTYPE) for n in (64, 16)]


def keep_busy() -> None:
    """Occupies the steps' stream, as a step in flight does."""
    if ON_CUDA:
        torch.cuda._sleep(WHILE_CYCLES)


def wait() -> None:
    if ON_CUDA:
        torch.cuda.synchronize()


def contents(caches: list[Tensor], block: int) -> list[Tensor]:
    return [cache[:, block].clone() for cache in caches]


def are_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_is_written_behind_a_save_is_not_in_it() -> None:
    """Neither has run when both are enqueued, and there are more blocks than staging buffers."""
    caches = make_caches()
    cache = CudaBlockCache(caches, architecture="Some", num_staging_buffers=NUM_STAGING_BUFFERS)
    blocks = (4, 0, 7, 1, 8, 2, 3)
    expected = [contents(caches, block) for block in blocks]
    staging_buffers = [cache.staging_buffer() for _ in blocks]
    torch.empty_like(caches[0]).zero_()  # loads its kernel now
    wait()
    keep_busy()
    saved = [
        cache.save(block, staging_buffer)
        for block, staging_buffer in zip(blocks, staging_buffers, strict=True)
    ]
    for each in caches:
        each.zero_()
    asked_early = [is_saved() for is_saved in saved]
    wait()
    if ON_CUDA:
        assert not any(asked_early), "the host has waited for the device"
    with ThreadPoolExecutor(1) as elsewhere:
        assert all(elsewhere.map(lambda is_saved: is_saved(), saved))
    for staging_buffer, wanted in zip(staging_buffers, expected, strict=True):
        cache.load(5, staging_buffer)
        assert are_equal(contents(caches, 5), wanted)


def test_a_load_comes_behind_what_was_begun_and_before_what_is_begun_next() -> None:
    """There are more blocks than staging buffers, and one array is rewritten for each load."""
    caches = make_caches()
    cache = CudaBlockCache(caches, architecture="Some", num_staging_buffers=NUM_STAGING_BUFFERS)
    source = cache.staging_buffer()
    cache.save(8, source)
    wait()
    wanted = contents(caches, 8)
    before = [contents(caches, block) for block in range(8)]
    content = np.empty_like(source)
    keep_busy()
    seen = []
    for block in range(8):
        old = contents(caches, block)
        np.copyto(content, source)
        cache.load(block, content)
        content.fill(255)
        seen.append((old, contents(caches, block)))
    for (old, new), expected in zip(seen, before, strict=True):
        assert are_equal(old, expected)
        assert are_equal(new, wanted)
        assert not are_equal(old, new)
