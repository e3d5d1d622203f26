"""Compares DeepSeek's decoders with transformers over the same weights. A sequence gets the same
bits alone, in a batch and in other chunks. Runs on a CUDA device in bf16, with graphs; elsewhere on
Triton's interpreter in float32."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from benchmarks.gpu_reference_deepseek import deepseek_reference  # noqa: E402
from gpu_worker.checkpoint.mla_shape import MlaShape  # noqa: E402
from gpu_worker.checkpoint.rope import Rope  # noqa: E402
from gpu_worker.cuda.decoder import Decoder, DecoderOptions  # noqa: E402
from gpu_worker.cuda.experts.slots import CudaSlots  # noqa: E402
from gpu_worker.cuda.stages.moe_stage import ExchangedMoe, LocalMoe, MoeStage  # noqa: E402
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes, Routing  # noqa: E402
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights  # noqa: E402
from gpu_worker.cuda.weights.random_weights import random_weights  # noqa: E402
from tests.support.cuda_steps import (  # noqa: E402
    BLOCK_TOKENS,
    BLOCKS_EACH,
    LoopbackExchange,
    continue_alone,
    continue_in_a_crowd,
)

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
TOLERANCE = 5e-2 if ON_CUDA else 1e-4
CONTEXT = BLOCKS_EACH * BLOCK_TOKENS
V3 = DecoderSizes(
    num_layers=2,
    hidden_size=64,
    vocab_size=128,
    attention=MlaShape(
        hidden_size=64,
        num_heads=2,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=16,
        rank=32,
        q_lora_rank=48,
        interleaved=True,
    ),
    rope=Rope(
        theta=10_000.0,
        kind="yarn",
        scaling={
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        context_tokens_max=128,
    ),
    moe_layers=(1,),
    num_experts=16,
    top_k=3,
    inner_size=32,
    routing=Routing(sigmoid=True, num_groups=4, topk_group=2, factor=2.5),
    shared_size=32,
    dense_size=96,
)
assert isinstance(V3.attention, MlaShape)
V2 = replace(
    V3,
    attention=replace(V3.attention, q_lora_rank=0),
    rope=Rope(theta=10_000.0, kind="default", scaling={}, context_tokens_max=128),
    routing=Routing(num_groups=4, topk_group=2, normalise=False, factor=1.5),
    shared_size=64,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    sizes: DecoderSizes
    weights: DecoderWeights
    slots: CudaSlots
    decoder: Decoder


def make_parts(sizes: DecoderSizes) -> Parts:
    torch.manual_seed(0)
    weights = random_weights(sizes, DEVICE, DTYPE, std=0.1)
    slots = empty_slots(sizes)
    # Small, so that an expert that bf16 chooses otherwise than float32 does weighs little.
    slots.fill_randomly(sizes.num_experts, std=0.05)
    moe = LocalMoe(slots, top_k=sizes.top_k, step_tokens_max=32)
    decoder = make_decoder(sizes, weights, moe)
    if ON_CUDA:
        decoder.capture()
    return Parts(sizes=sizes, weights=weights, slots=slots, decoder=decoder)


def make_decoder(sizes: DecoderSizes, weights: DecoderWeights, moe: MoeStage) -> Decoder:
    options = DecoderOptions(
        kv_blocks=8 * BLOCKS_EACH,
        block_tokens=BLOCK_TOKENS,
        context_tokens_max=CONTEXT,
        decode_batch_sizes=(1, 8),
        prefill_tokens=32,
        prefill_sequences=4,
    )
    decoder = Decoder(sizes, weights, moe, options)
    table = np.arange(sizes.num_experts, dtype=np.int32)
    decoder.use_slots(np.tile(table, (sizes.num_moe_layers, 1, 1)))
    return decoder


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, V3.vocab_size, length).tolist()


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("sizes", [V3, V2], ids=["V3", "V2"])
def test_logits_are_those_of_transformers(sizes: DecoderSizes) -> None:
    parts = make_parts(sizes)
    tokens = prompt(1, 37)
    new, logits = continue_alone(parts.decoder, tokens, chunk=20, more=3)
    ids = torch.tensor([tokens + new[:-1]], device=DEVICE)
    theirs, exact = (
        deepseek_reference(sizes, parts.weights, parts.slots, dtype=dtype)
        for dtype in (None, torch.float32)
    )
    with torch.no_grad():
        exact_logits = exact(ids).logits[0, len(tokens) - 1 :]
        their_logits = theirs(ids).logits[0, len(tokens) - 1 :]
    error = distance(logits, exact_logits)
    if ON_CUDA:
        assert error < max(1.5 * distance(their_logits, exact_logits), TOLERANCE)
    else:
        assert error < TOLERANCE


def test_tokens_do_not_depend_on_neighbours_or_chunks() -> None:
    decoder = make_parts(V3).decoder
    tokens = prompt(2, 21)
    alone, logits = continue_alone(decoder, tokens, chunk=32, more=2)
    again, other_chunks = continue_alone(decoder, tokens, chunk=8, more=2)
    assert alone == again
    neighbours = prompt(3, 20), prompt(4, 9)
    crowd, crowd_logits = continue_in_a_crowd(decoder, tokens, neighbours, more=2)
    assert crowd == alone
    if ON_CUDA:  # the interpreter multiplies with numpy, whose rounding depends on the shape
        assert torch.equal(other_chunks, logits)
        assert torch.equal(crowd_logits, logits[1:])


def test_an_exchange_that_pads_by_slot_gives_the_same_tokens_and_meets_no_dense_layer() -> None:
    parts = make_parts(V3)
    tokens = prompt(5, 18)
    local, logits = continue_alone(parts.decoder, tokens, chunk=32, more=1)
    exchange = LoopbackExchange(parts.slots.slots_per_rank, 32, V3.hidden_size)
    moe = ExchangedMoe(parts.slots, exchange, rows_of_slot=32)
    decoder = make_decoder(V3, parts.weights, moe)
    exchanged, other = continue_alone(decoder, tokens, chunk=32, more=1)
    assert distance(other[0], logits[0]) < TOLERANCE
    if not ON_CUDA:  # there the sum over experts is rounded on its way
        assert exchanged == local
    assert exchange.layers == [0, 0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 48}, "kv_lora_rank"),
        ({"num_index_heads": 2, "index_head_dim": 24, "index_top_k": 16}, "index_head_dim"),
    ],
    ids=str,
)
def test_sizes_without_kernels_are_refused(change: dict[str, int], complaint: str) -> None:
    assert isinstance(V3.attention, MlaShape)
    sizes = replace(V3, attention=replace(V3.attention, **change))
    weights = random_weights(sizes, DEVICE, DTYPE)
    moe = LocalMoe(empty_slots(sizes), top_k=sizes.top_k, step_tokens_max=32)
    with pytest.raises(ValueError, match=complaint):
        make_decoder(sizes, weights, moe)


def empty_slots(sizes: DecoderSizes) -> CudaSlots:
    return CudaSlots(
        num_layers=sizes.num_moe_layers,
        slots_per_rank=sizes.num_experts,
        hidden_size=sizes.hidden_size,
        inner_size=sizes.inner_size,
        device=DEVICE,
        dtype=DTYPE,
    )
