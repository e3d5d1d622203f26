"""Compares the whole decoder with transformers over the same weights. A sequence gets the same bits
alone, in a batch, in other chunks, and after its experts have moved to other slots. Runs on a CUDA
device in bf16, with graphs; elsewhere on Triton's interpreter in float32."""

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

from benchmarks.gpu_reference import reference_model  # noqa: E402
from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, GqaShape  # noqa: E402
from gpu_worker.checkpoint.rope import Rope  # noqa: E402
from gpu_worker.cuda.decoder import Decoder, DecoderOptions  # noqa: E402
from gpu_worker.cuda.experts.slots import CudaSlots, SlotUpload  # noqa: E402
from gpu_worker.cuda.stages.moe_stage import ExchangedMoe, LocalMoe  # noqa: E402
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes  # noqa: E402
from gpu_worker.cuda.weights.decoder_weights import DecoderWeights  # noqa: E402
from gpu_worker.cuda.weights.random_weights import random_weights  # noqa: E402
from tests.support.cuda_steps import (  # noqa: E402
    BLOCK_TOKENS,
    BLOCKS_EACH,
    Fp8LoopbackExchange,
    LoopbackExchange,
    RoundingLoopbackExchange,
    batch_of,
    continue_alone,
    step,
)

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
TOLERANCE = 5e-2 if ON_CUDA else 1e-4
SIZES = DecoderSizes(
    num_layers=2,
    hidden_size=128,
    attention=GqaShape(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=QK_NORM_HEAD),
    rope=Rope(theta=1e6, kind="default", scaling={}, context_tokens_max=128),
    moe_layers=(0, 1),
    num_experts=8,
    top_k=2,
    inner_size=64,
    vocab_size=256,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    decoder: Decoder
    weights: DecoderWeights
    slots: CudaSlots
    reference: torch.nn.Module  # in our type
    exact: torch.nn.Module  # the same weights, in float32


@pytest.fixture
def parts() -> Parts:
    torch.manual_seed(0)
    weights = random_weights(SIZES, DEVICE, DTYPE, std=0.1)
    slots = CudaSlots(
        num_layers=SIZES.num_moe_layers,
        slots_per_rank=SIZES.num_experts + 2,
        hidden_size=SIZES.hidden_size,
        inner_size=SIZES.inner_size,
        device=DEVICE,
        dtype=DTYPE,
    )
    slots.fill_randomly(SIZES.num_experts, std=0.1)
    return Parts(
        decoder=make_decoder(weights, LocalMoe(slots, top_k=SIZES.top_k, step_tokens_max=32)),
        weights=weights,
        slots=slots,
        reference=reference_model(SIZES, weights, slots, context=128),
        exact=reference_model(SIZES, weights, slots, context=128, dtype=torch.float32),
    )


def make_decoder(weights, moe, mask_R: torch.Tensor | None = None) -> Decoder:
    options = DecoderOptions(
        kv_blocks=8 * BLOCKS_EACH,
        block_tokens=BLOCK_TOKENS,
        context_tokens_max=BLOCKS_EACH * BLOCK_TOKENS,
        decode_batch_sizes=(1, 8),
        prefill_tokens=32,
        prefill_sequences=4,
    )
    decoder = Decoder(SIZES, weights, moe, options, mask_R=mask_R)
    decoder.use_slots(
        np.tile(np.arange(SIZES.num_experts, dtype=np.int32), (SIZES.num_moe_layers, 1, 1))
    )
    if ON_CUDA:
        decoder.capture()
    return decoder


def test_a_short_prompt_has_a_smaller_step_than_the_longest_chunk() -> None:
    options = DecoderOptions(kv_blocks=8, prefill_tokens=1024, prefill_sequences=192)
    sizes = options.prefill_sizes(8)
    assert [(size.tokens, size.sequences, size.rows) for size in sizes] == [
        (128, 128, 128),
        (256, 192, 192),
        (512, 192, 192),
        (1024, 192, 192),
    ]
    small = DecoderOptions(kv_blocks=8, prefill_tokens=192, prefill_sequences=192)
    assert [size.tokens for size in small.prefill_sizes(8)] == [192]


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, SIZES.vocab_size, length).tolist()


def test_logits_are_those_of_transformers(parts: Parts) -> None:
    tokens = prompt(1, 37)
    new, logits = continue_alone(parts.decoder, tokens, chunk=20, more=3)
    ids = torch.tensor([tokens + new[:-1]], device=DEVICE)
    with torch.no_grad():
        theirs = parts.reference(ids).logits[0, len(tokens) - 1 :]
        exact = parts.exact(ids).logits[0, len(tokens) - 1 :]
    error = distance(logits, exact)
    if ON_CUDA:
        assert error < 1.2 * distance(theirs, exact), "bf16 rounds no worse than transformers' does"
    else:
        assert error < TOLERANCE


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits.float() - reference).norm() / reference.norm())


def test_tokens_do_not_depend_on_neighbours_chunks_or_slots(parts: Parts) -> None:
    tokens = prompt(2, 33)
    alone, logits = continue_alone(parts.decoder, tokens, chunk=32, more=3)
    again, other_chunks = continue_alone(parts.decoder, tokens, chunk=7, more=3)
    assert alone == again
    move_expert(parts, layer=1, expert=3, slot=SIZES.num_experts + 1)
    step(parts.decoder, {1: prompt(3, 20)}, [0])
    step(parts.decoder, {2: prompt(4, 9)}, [0])
    step(parts.decoder, {0: tokens[:10], 1: [5], 2: [6]}, [0, 20, 9])
    ids, _ = step(parts.decoder, {0: tokens[10:]}, [10])
    crowd, crowd_logits = [int(ids[0])], []
    for n in range(3):
        chunks = {0: crowd[-1:], 1: [7 + n], 2: [9 + n]}
        ids, rows = step(parts.decoder, chunks, [33 + n, 21 + n, 10 + n])
        crowd.append(int(ids[0]))
        crowd_logits.append(rows[0])
    assert crowd == alone
    if ON_CUDA:  # the interpreter multiplies with numpy, whose rounding depends on the shape
        assert torch.equal(other_chunks, logits)
        assert torch.equal(torch.stack(crowd_logits), logits[1:])


def test_a_step_may_be_enqueued_before_the_former_ones_token_is_known(parts: Parts) -> None:
    tokens = prompt(6, 12)
    known, _ = continue_alone(parts.decoder, tokens, chunk=32, more=3)
    pending = [parts.decoder.launch(batch_of({0: tokens}, [0]))]
    new = []
    for n in range(3):
        pending.append(parts.decoder.launch(batch_of({0: [-1]}, [len(tokens) + n])))
        new.append(int(pending[-2].ids()[0]))
    new.append(int(pending[-1].ids()[0]))
    assert new == known


def test_rows_are_wanted_in_any_order(parts: Parts) -> None:
    batch = batch_of({0: [5], 1: [9]}, [0, 0])
    in_order = parts.decoder.launch(batch).logits_RV.float().clone()
    reversed_rows = replace(batch, logits_rows_R=np.array([1, 0], dtype=np.int32))
    pending = parts.decoder.launch(reversed_rows)
    pending.ids()
    assert distance(pending.logits_RV, in_order.flip(0)) < TOLERANCE
    assert distance(pending.logits_RV, in_order) > 0.1


def test_each_of_two_steps_in_flight_brings_the_mask_that_it_has_seen(parts: Parts) -> None:
    mask_R = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    weights = random_weights(SIZES, DEVICE, DTYPE, std=0.1)
    moe = LocalMoe(parts.slots, top_k=SIZES.top_k, step_tokens_max=32)
    decoder = make_decoder(weights, moe, mask_R)
    tokens = prompt(7, 12)
    first = decoder.launch(batch_of({0: tokens}, [0]))
    mask_R[2] = 0
    second = decoder.launch(batch_of({0: [-1]}, [len(tokens)]))
    new = [int(first.ids()[0]), int(second.ids()[0])]
    masks = [first.mask(), second.mask()]
    assert first.is_done()
    assert second.is_done()
    assert [mask.tolist() for mask in masks if mask is not None] == [[1, 0, 1], [1, 0, 0]]
    unmasked = make_decoder(weights, moe)
    assert continue_alone(unmasked, tokens, chunk=32, more=1)[0] == new
    assert unmasked.launch(batch_of({0: [1]}, [0])).mask() is None


def move_expert(parts: Parts, *, layer: int, expert: int, slot: int) -> None:
    """Loads the expert into another slot from the host, and fills its old slot with values that
    must not be read."""
    values = torch.cat(
        [
            parts.slots.w_gate_up_LSJH[layer, expert].flatten(),
            parts.slots.w_down_LSHI[layer, expert].flatten(),
        ]
    ).cpu()
    if ON_CUDA:
        values = values.pin_memory()
    parts.slots.load([SlotUpload(layer, slot, expert, values)])
    assert parts.slots.contents[layer, slot] == expert
    parts.slots.w_gate_up_LSJH[layer, expert].fill_(float("nan"))
    table = np.tile(np.arange(SIZES.num_experts, dtype=np.int32), (SIZES.num_moe_layers, 1, 1))
    table[layer, 0, expert] = slot
    parts.decoder.use_slots(table)


def test_an_exchange_that_pads_by_slot_gives_the_same_tokens(parts: Parts) -> None:
    tokens = prompt(5, 30)
    local, logits = continue_alone(parts.decoder, tokens, chunk=32, more=1)
    decoder = decoder_over(
        parts, LoopbackExchange(parts.slots.slots_per_rank, 32, SIZES.hidden_size)
    )
    exchanged, other = continue_alone(decoder, tokens, chunk=32, more=1)
    assert distance(other[0], logits[0]) < TOLERANCE
    if not ON_CUDA:  # there the sum over experts is rounded on its way
        assert exchanged == local


def decoder_over(parts: Parts, exchange: LoopbackExchange) -> Decoder:
    moe = ExchangedMoe(parts.slots, exchange, rows_of_slot=exchange.rows_of_slot)
    return make_decoder(parts.weights, moe)


def test_rows_that_are_filled_up_give_the_same_bits(parts: Parts) -> None:
    tokens, num_slots = prompt(5, 30), parts.slots.slots_per_rank
    exact, wide = (
        continue_alone(
            decoder_over(parts, LoopbackExchange(num_slots, 32, row_size)), tokens, chunk=32, more=2
        )
        for row_size in (SIZES.hidden_size, SIZES.hidden_size + 64)
    )
    assert exact[0] == wide[0]
    assert torch.equal(exact[1], wide[1])


@pytest.mark.parametrize("row_size", [SIZES.hidden_size, SIZES.hidden_size + 64])
def test_tokens_that_travel_as_fp8_are_computed_as_what_fp8_leaves_of_them(
    parts: Parts, row_size: int
) -> None:
    tokens, num_slots, group = prompt(8, 30), parts.slots.slots_per_rank, 32
    plain, fp8, rounding = (
        continue_alone(decoder_over(parts, exchange), tokens, chunk=32, more=2)
        for exchange in (
            LoopbackExchange(num_slots, 32, SIZES.hidden_size),
            Fp8LoopbackExchange(num_slots, 32, row_size, group=group),
            RoundingLoopbackExchange(num_slots, 32, row_size, group=group),
        )
    )
    assert fp8[0] == rounding[0]
    assert torch.equal(fp8[1], rounding[1])
    assert 1e-3 < distance(fp8[1][0], plain[1][0]) < 0.2


def test_fp8_dispatch_leaves_tokens_independent_of_neighbours_and_chunks(parts: Parts) -> None:
    tokens = prompt(9, 24)
    decoder = decoder_over(
        parts, Fp8LoopbackExchange(parts.slots.slots_per_rank, 32, SIZES.hidden_size, group=32)
    )
    alone, logits = continue_alone(decoder, tokens, chunk=32, more=1)
    again, other_chunks = continue_alone(decoder, tokens, chunk=10, more=1)
    step(decoder, {1: prompt(3, 20)}, [0])
    step(decoder, {0: tokens[:10], 1: [5]}, [0, 20])
    ids, crowd_logits = step(decoder, {0: tokens[10:], 1: [6]}, [10, 21])
    assert alone == again
    assert int(ids[0]) == alone[0]
    if ON_CUDA:  # the interpreter multiplies with numpy, whose rounding depends on the shape
        assert torch.equal(other_chunks, logits)
        assert torch.equal(crowd_logits[0], logits[0])
