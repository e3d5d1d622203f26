"""Experts in MXFP4: a row has the bits that it has with the widened weights, alone and in any tile,
and is close to their product in float64. Runs on a CUDA device in bf16; elsewhere on Triton's
interpreter in float32, if Triton is installed and TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.cuda_values import DEVICE, DTYPE, ON_CUDA, Closeness, ints, poison, random
from tests.support.mxfp4_values import random_mxfp4, widened, widened_gate_up

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.gpt_oss_config import SWIGLU_ALPHA, SWIGLU_LIMIT
from gpu_worker.cuda.kernels import experts, mxfp4_experts, routing
from gpu_worker.cuda.kernels.activation import SILU_GATED, Epilogue
from gpu_worker.cuda.kernels.mxfp4_experts import Mxfp4Tile
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS
from gpu_worker.cuda.weights.mxfp4_matrix import ExpertMatrix, Mxfp4Matrix

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(6e-3 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
SLOTS, TOP_K = 5, 2
ROWS = 90 if ON_CUDA else 9
HIDDEN, INNER = (576, 320) if ON_CUDA else (192, 64)
"""Neither a multiple of 128, as gpt-oss's are not, but of 64."""
SIZES = [(HIDDEN, INNER), (96, 160)]
"""(hidden, inner): the last leaves a program with rows of weights that do not exist."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def weights(hidden: int, inner: int) -> tuple[Mxfp4Matrix, Mxfp4Matrix]:
    return random_mxfp4(SLOTS, 2 * inner, hidden), random_mxfp4(SLOTS, hidden, inner)


def gpt_oss_epilogue(hidden: int, inner: int) -> Epilogue:
    b_gate_up, b_down = random(SLOTS, 2 * inner), random(SLOTS, hidden)
    return Epilogue(clamped=True, b_gate_up_SJ=b_gate_up, b_down_SH=b_down)


def run(
    x: torch.Tensor,
    w1: ExpertMatrix,
    w2: ExpertMatrix,
    rows: experts.Rows,
    num: int,
    epilogue: Epilogue = SILU_GATED,
) -> torch.Tensor:
    _, hidden, inner_size = w2.shape
    inner, y = poison(num, inner_size), poison(num, hidden)
    experts.gate_up(x, w1, rows, inner, epilogue=epilogue)
    experts.down(inner, w2, rows, y, epilogue=epilogue)
    return y


def expected(
    x: torch.Tensor, w1: Mxfp4Matrix, w2: Mxfp4Matrix, slot: int, epilogue: Epilogue = SILU_GATED
) -> torch.Tensor:
    sums = x.double() @ widened_gate_up(w1)[slot].T
    if epilogue.b_gate_up_SJ is not None:
        sums += epilogue.b_gate_up_SJ[slot].double()
    gate, up = sums.chunk(2, dim=-1)
    if epilogue.clamped:
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        inner = gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    else:
        inner = torch.nn.functional.silu(gate) * up
    y = inner.to(x.dtype).double() @ widened(w2)[slot].T
    return y if epilogue.b_down_SH is None else y + epilogue.b_down_SH[slot].double()


def some_slots(rows: int) -> torch.Tensor:
    """Slot 0 has a row of every token but the last, which has no slot."""
    slots = torch.randint(1, SLOTS, (rows, TOP_K), device=DEVICE)
    slots[:, 0] = 0
    slots[-1] = routing.NO_SLOT
    return slots


def in_tiles(slots: torch.Tensor, tile_rows: int) -> experts.Rows:
    tiles = routing.new_slot_tiles(slots.numel(), SLOTS, tile_rows, DEVICE)
    routing.group_by_slot(slots, SLOTS, tiles)
    return experts.Rows(slots, tiles)


@pytest.mark.parametrize("tile_rows", [16, 32, 64, TALL_ROWS])
@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_each_pair_has_the_same_bits_alone_and_in_a_tile(
    hidden: int, inner: int, tile_rows: int
) -> None:
    x, (w1, w2), slots = random(ROWS, hidden), weights(hidden, inner), some_slots(ROWS)
    num = (ROWS - 1) * TOP_K
    alone = run(x, w1, w2, experts.Rows(slots, None), ROWS * TOP_K)
    assert alone[num:].isnan().all()
    together = run(x, w1, w2, in_tiles(slots, tile_rows), ROWS * TOP_K)
    assert_same(together[:num], alone[:num])
    assert together[num:].isnan().all()


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_values_are_those_of_the_widened_weights_in_float64(
    hidden: int, inner: int, has_biases: bool
) -> None:
    x, (w1, w2), slots = random(9, hidden), weights(hidden, inner), some_slots(9)
    epilogue = gpt_oss_epilogue(hidden, inner) if has_biases else SILU_GATED
    y = run(x, w1, w2, experts.Rows(slots, None), 9 * TOP_K, epilogue)
    for slot in range(SLOTS):
        mine = (slots.view(-1) == slot).nonzero()[:, 0]
        if len(mine):
            assert_close(y[mine], expected(x[mine // TOP_K], w1, w2, slot, epilogue))


@pytest.mark.parametrize("tile_rows", [0, 16, TALL_ROWS])
def test_a_row_has_the_bits_that_it_has_with_the_widened_weights(tile_rows: int) -> None:
    """With gpt-oss's biases and activation. The kernels of bfloat16 add in the same order."""
    x, (w1, w2), slots = random(ROWS, HIDDEN), weights(HIDDEN, INNER), some_slots(ROWS)
    epilogue = gpt_oss_epilogue(HIDDEN, INNER)
    rows = in_tiles(slots, tile_rows) if tile_rows else experts.Rows(slots, None)
    num = (ROWS - 1) * TOP_K
    native = run(x, w1, w2, rows, ROWS * TOP_K, epilogue)
    wide_1, wide_2 = widened_gate_up(w1).to(DTYPE), widened(w2).to(DTYPE)
    plain = run(x, wide_1, wide_2, rows, ROWS * TOP_K, epilogue)
    assert_same(native[:num], plain[:num])


@pytest.mark.parametrize(
    "tile", [Mxfp4Tile(64, 128, 4, 2), Mxfp4Tile(64, 256, 4, 2), Mxfp4Tile(128, 128, 8, 3)]
)
def test_a_tiles_shape_changes_no_bit(tile: Mxfp4Tile) -> None:
    rows = 20 if ON_CUDA else 3
    x, (w1, w2) = random(rows, HIDDEN), weights(HIDDEN, INNER)
    lone = experts.Rows(some_slots(rows), None)
    given = []
    for these in (None, tile):
        between, y = poison(rows * TOP_K, INNER), poison(rows * TOP_K, HIDDEN)
        mxfp4_experts.gate_up(x, w1, lone, between, SILU_GATED, tile=these)
        mxfp4_experts.down(between, w2, lone, y, SILU_GATED, tile=these)
        given.append(y[: (rows - 1) * TOP_K])
    assert_same(*given)


@pytest.mark.parametrize("tile_rows", [16, TALL_ROWS])
def test_rows_that_lie_padded_by_slot(tile_rows: int) -> None:
    hidden, inner, width = 128, 64, 150
    counts = ints([0, 130, 20, 1, 3])
    x, (w1, w2) = random(SLOTS * width, hidden), weights(hidden, inner)
    epilogue = gpt_oss_epilogue(hidden, inner)
    tiles = routing.new_slot_tiles(SLOTS * width, SLOTS, tile_rows, DEVICE)
    routing.fill_padded_tiles(counts, width, tiles)
    rows = experts.Rows(counts, tiles, padded=True)
    y = run(x, w1, w2, rows, SLOTS * width, epilogue).view(SLOTS, width, hidden)
    x = x.view(SLOTS, width, hidden)
    for slot, count in enumerate(counts.tolist()):
        assert y[slot, count:].isnan().all()
        if count:
            assert_close(y[slot, :count], expected(x[slot, :count], w1, w2, slot, epilogue))
            alone = torch.full((1, 1), slot, dtype=torch.int64, device=DEVICE)
            last = x[slot, count - 1 : count].contiguous()
            lone = run(last, w1, w2, experts.Rows(alone, None), 1, epilogue)
            assert_same(lone[0], y[slot, count - 1])


def test_lone_pairs_choose_for_themselves() -> None:
    rows, hidden, inner, num_experts = 3, 128, 64, 12
    x, scores = random(rows, hidden), random(rows, num_experts, dtype=torch.float32)
    w1, _ = weights(hidden, inner)
    epilogue = gpt_oss_epilogue(hidden, inner)
    slot_of = (torch.arange(num_experts, device=DEVICE) % SLOTS).to(torch.int32)
    slot_of[7] = routing.NO_SLOT
    choice = routing.Choice(scores, slot_of, ints([4, 0, -1]), True, 0.7)
    given = []
    for chooses in (True, False):
        slots = torch.full((rows, TOP_K), 99, dtype=torch.int64, device=DEVICE)
        weights_TK = poison(rows, TOP_K, dtype=torch.float32)
        between = poison(rows * TOP_K, inner)
        chosen = experts.FusedChoice(choice, weights_TK) if chooses else None
        if not chooses:
            routing.choose_slots(scores, *choice[:3], slots, weights_TK, normalise=True, factor=0.7)
        experts.gate_up(x, w1, experts.Rows(slots, None), between, chosen=chosen, epilogue=epilogue)
        given.append((slots, weights_TK, between.nan_to_num(5.0)))
    for one, other in zip(*given, strict=True):
        assert torch.equal(one, other)
    assert not (given[0][2][:2] == 5.0).all()


def test_every_code_and_scale_is_widened_to_its_value() -> None:
    """Through the product with a vector of one value, so that a sum has one term. It is so large
    that no sum is subnormal; scales are from 2⁻¹²⁷ on up to the largest that makes none infinite.
    """
    hidden, inner, value = 256, 128, 2.0**20
    largest = 252 - 20
    codes = torch.arange(inner // 2, device=DEVICE) + 64 * torch.arange(4, device=DEVICE)[:, None]
    w2 = Mxfp4Matrix(
        codes.to(torch.uint8).repeat(hidden // 4, 1)[None].contiguous(),
        torch.arange(hidden, device=DEVICE).clamp(max=largest).to(torch.uint8)[None, None, :, None]
        .repeat(1, 1, 1, 4),
    )  # fmt: skip
    rows = in_tiles(torch.zeros(inner, 1, dtype=torch.int64, device=DEVICE), 64)
    y = poison(inner, hidden)
    experts.down((value * torch.eye(inner, device=DEVICE)).to(y.dtype), w2, rows, y)
    assert torch.equal(y.T.double(), value * widened(w2)[0])
