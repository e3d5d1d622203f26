"""A KV cache in e4m3: what goes in is rounded and bounded, what comes out is exactly what it holds,
in every kernel that reads it, and a whole decoder's tokens stay independent of chunks and
neighbours. Runs on a CUDA device in bf16; elsewhere on Triton's interpreter in float32."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tests.support.cuda_values import DEVICE, DTYPE, ON_CUDA, ints, poison, random

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, GqaShape
from gpu_worker.checkpoint.mla_shape import MlaShape
from gpu_worker.checkpoint.rope import Rope
from gpu_worker.cuda.decoder import Decoder, DecoderOptions
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.kernels import attention, chunk_attention, latent, projected_heads, splits
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.stages.moe_stage import LocalMoe
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.random_weights import random_weights
from tests.support.cuda_steps import (
    BLOCK_TOKENS,
    BLOCKS_EACH,
    continue_alone,
    continue_in_a_crowd,
)

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
RANK, ROTATED = 64, 32
EPS = 1e-6
BLOCKS = 16
PLAIN = {"rope": Rope(theta=1e6, kind="default", scaling={}, context_tokens_max=128)}
EXPERTS = {"num_experts": 8, "top_k": 2, "inner_size": 64, "vocab_size": 256}
GQA = DecoderSizes(
    num_layers=2,
    hidden_size=128,
    attention=GqaShape(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=QK_NORM_HEAD),
    moe_layers=(0, 1),
    **PLAIN,
    **EXPERTS,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stored(x: torch.Tensor) -> torch.Tensor:
    """What e4m3 keeps of float32 values."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def new_cache(sequences: int) -> torch.Tensor:
    return stored(random(sequences * BLOCKS, KV_HEADS, BLOCK_TOKENS, HEAD_DIM, dtype=torch.float32))


def paging(positions: list[int], sequences: list[int]) -> Paging:
    count = max(sequences) + 1
    tables = torch.randperm(count * BLOCKS, device=DEVICE).view(count, BLOCKS).to(torch.int32)
    return Paging(ints(positions), ints(sequences), tables, None, 1)


def partials(rows: int, parts_max: int) -> splits.Partials:
    return splits.new_partials(rows, HEADS, parts_max, HEAD_DIM, DEVICE)


def projections(rows: int, scale: float = 1.0) -> projected_heads.QkvParts:
    qkv = random(2, rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float32, scale=scale)
    powers = 10_000.0 ** (torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
    angles = torch.arange(256, device=DEVICE)[:, None] / powers[None, :]
    norms = random(HEAD_DIM), random(HEAD_DIM)
    return projected_heads.QkvParts(qkv, *norms, angles.cos(), angles.sin(), EPS)


def test_keys_and_values_are_rounded_and_bounded() -> None:
    where, qkv_parts = paging([40, 3], [1, 0]), projections(2, scale=300.0)
    written = []
    for dtype in (torch.float32, FP8):
        k, v = (torch.zeros(new_cache(2).shape, dtype=dtype, device=DEVICE) for _ in "kv")
        q = poison(2, HEADS, HEAD_DIM)
        projected_heads.rotate_and_store(qkv_parts, where, q, k, v)
        written.append((k, v))
    for wide, narrow in zip(*written, strict=True):
        assert torch.equal(bits(narrow), bits(stored(wide)))
    assert float(written[1][1].float().abs().max()) == FP8_MAX, "some values are beyond the range"


def test_latents_are_rounded_and_their_keys_are_not() -> None:
    where = paging([40, 3], [1, 0])
    parts = random(2, 2, 7 + RANK + ROTATED, dtype=torch.float32)
    angles = torch.rand(64, ROTATED // 2, device=DEVICE) * 6
    rotation = latent.Rotation(angles.cos(), angles.sin(), True)
    kv_norm = random(RANK)
    caches = [
        latent.LatentCache(
            torch.zeros(2 * BLOCKS, BLOCK_TOKENS, RANK, dtype=dtype, device=DEVICE),
            torch.zeros(2 * BLOCKS, BLOCK_TOKENS, ROTATED, dtype=torch.float32, device=DEVICE),
        )
        for dtype in (torch.float32, FP8)
    ]
    for cache in caches:
        latent.norm_and_store(parts, None, kv_norm, rotation, where, None, cache, eps=EPS)
    wide, narrow = caches
    assert torch.equal(bits(narrow.latent_BUR), bits(stored(wide.latent_BUR)))
    assert torch.equal(narrow.key_BUW, wide.key_BUW)


@pytest.mark.parametrize("window", [0, 70])
def test_attention_reads_what_the_cache_holds(window: int) -> None:
    """In decode, in tiles and in chunks: to the bit as if the cache held these values wide."""
    positions = [*range(3), *range(100, 112), 130]
    single = paging(positions, [0] * 3 + [1] * 12 + [2])
    tile_tokens = chunk_attention.chunk_tile_tokens(HEADS, KV_HEADS)
    tiles = [
        [first + at, min(tile_tokens, count - at)]
        for first, count in [(0, 3), (3, 12), (15, 1)]
        for at in range(0, count, tile_tokens)
    ]
    tiled = single._replace(tiles_C2=torch.tensor(tiles, dtype=torch.int32, device=DEVICE))
    tiled = tiled._replace(tile_tokens=tile_tokens)
    q, k, v = random(len(positions), HEADS, HEAD_DIM), new_cache(3), new_cache(3)
    kind = splits.WindowAndSinks(window)
    results = []
    for keys, values in ((k, v), (k.to(DTYPE), v.to(DTYPE))):
        for where in (single, tiled):
            out, room = poison(len(positions), HEADS * HEAD_DIM), partials(len(positions), 4)
            attention.attend(q, keys, values, where, room, out, kind=kind)
            results.append(out)
        out, merged = poison(len(positions), HEADS * HEAD_DIM), poison(*q.shape).float()
        chunk_attention.attend_chunks(q, keys, values, tiled, merged, out, kind=kind)
        results.append(out)
    for narrow, wide in zip(results[:3], results[3:], strict=True):
        assert narrow.isfinite().all()
        assert torch.equal(narrow, wide)


def test_attention_all_by_itself_reads_the_new_token_as_the_cache_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The program that stores a new key has it in its registers, wide."""
    where, qkv_parts = paging([1, 64, 65, 200], [0, 1, 2, 3]), projections(4)
    k, v = new_cache(4), new_cache(4)
    merging = attention.MergeBuffers(
        partials(4, 1), torch.zeros(4, KV_HEADS, 2, dtype=torch.int32, device=DEVICE)
    )
    given = []
    for rows_max in (4, 3):
        monkeypatch.setattr(attention, "FUSED_ATTENTION_ROWS_MAX", rows_max)
        keys, values, out = k.clone(), v.clone(), poison(4, HEADS * HEAD_DIM)
        q, room = poison(4, HEADS, HEAD_DIM), partials(4, 4)
        attention.attend_projected(qkv_parts, where, q, keys, values, room, merging, out)
        given.append((out, bits(keys), bits(values)))
    for one, other in zip(*given, strict=True):
        assert torch.equal(one, other)


def test_latent_attention_reads_what_the_cache_holds() -> None:
    where = paging([0, 60, 200, 31], [0, 1, 1, 0])
    q, q_rotated = random(4, HEADS, RANK), random(4, HEADS, ROTATED)
    narrow = stored(random(2 * BLOCKS, BLOCK_TOKENS, RANK, dtype=torch.float32))
    key = random(2 * BLOCKS, BLOCK_TOKENS, ROTATED)
    results = []
    for latents in (narrow, narrow.to(DTYPE)):
        room = splits.new_partials(4, HEADS, latent.num_splits(256), RANK, DEVICE)
        out = poison(4, HEADS, RANK)
        cache = latent.LatentCache(latents, key)
        latent.attend_latents(q, q_rotated, cache, where, room, out, scale=RANK**-0.5)
        results.append(out)
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def latent_sizes() -> DecoderSizes:
    shape = MlaShape(
        hidden_size=128,
        num_heads=4,
        q_lora_rank=48,
        rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        interleaved=True,
    )
    return DecoderSizes(
        num_layers=2, hidden_size=128, attention=shape, moe_layers=(0, 1), **PLAIN, **EXPERTS
    )


def make_decoders(sizes: DecoderSizes) -> tuple[Decoder, Decoder]:
    """Over the same weights: with a cache in the model's own format, and in e4m3."""
    weights = random_weights(sizes, DEVICE, DTYPE, std=0.1)
    slots = CudaSlots(
        num_layers=sizes.num_moe_layers,
        slots_per_rank=sizes.num_experts,
        hidden_size=sizes.hidden_size,
        inner_size=sizes.inner_size,
        device=DEVICE,
        dtype=DTYPE,
    )
    slots.fill_randomly(sizes.num_experts, std=0.1)
    decoders = []
    for kv_dtype in (None, FP8):
        options = DecoderOptions(
            kv_blocks=8 * BLOCKS_EACH,
            block_tokens=BLOCK_TOKENS,
            context_tokens_max=BLOCKS_EACH * BLOCK_TOKENS,
            decode_batch_sizes=(1, 8),
            prefill_tokens=32,
            prefill_sequences=4,
            kv_dtype=kv_dtype,
        )
        moe = LocalMoe(slots, top_k=sizes.top_k, step_tokens_max=32)
        decoder = Decoder(sizes, weights, moe, options)
        table = np.arange(sizes.num_experts, dtype=np.int32)
        decoder.use_slots(np.tile(table, (sizes.num_moe_layers, 1, 1)))
        if ON_CUDA:
            decoder.capture()
        decoders.append(decoder)
    return decoders[0], decoders[1]


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sizes", [GQA, latent_sizes()], ids=["grouped", "latent"])
def test_tokens_do_not_depend_on_neighbours_or_chunks(sizes: DecoderSizes) -> None:
    wide, decoder = make_decoders(sizes)
    assert decoder.attention.cache()[0].dtype is FP8
    tokens = prompt(2, 33)
    alone, logits = continue_alone(decoder, tokens, chunk=32, more=3)
    again, other_chunks = continue_alone(decoder, tokens, chunk=7, more=3)
    assert alone == again
    neighbours = prompt(3, 20), prompt(4, 9)
    crowd, crowd_logits = continue_in_a_crowd(decoder, tokens, neighbours, more=3)
    assert crowd == alone
    if ON_CUDA:  # the interpreter multiplies with numpy, whose rounding depends on the shape
        assert torch.equal(other_chunks, logits)
        assert torch.equal(crowd_logits, logits[1:])
    _, exact = continue_alone(wide, tokens, chunk=32, more=0)
    error = (logits[0].float() - exact[0].float()).norm() / exact[0].float().norm()
    assert 0.0 < float(error) < 0.1, "three bits of a mantissa round by 3 % at most"
