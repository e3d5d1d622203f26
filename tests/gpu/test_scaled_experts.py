"""Experts in block-scaled FP8: compared with their dequantised weights in float64, and each row's
bits alone with those in any tile. Runs on a CUDA device in bf16; elsewhere on Triton's interpreter
in float32, if Triton is installed and TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from tests.support.cuda_values import DEVICE, ON_CUDA, Closeness, ints, poison, random
from tests.support.scaled_values import dequantised, random_blocks

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.cuda.kernels import experts, routing, scaled_experts
from gpu_worker.cuda.kernels.scaled_operands import ScaledTile
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS
from gpu_worker.cuda.weights.scaled_blocks import ScaledBlocks

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(6e-3 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
SLOTS, TOP_K = 5, 2
SIZES = [(256, 128), (208, 80), (384, 160)]
"""(hidden, inner): whole blocks; partial ones, of which programs get rows of weights that do not
exist; and an inner size whose last block is partial."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def weights(hidden: int, inner: int) -> tuple[ScaledBlocks, ScaledBlocks]:
    return random_blocks(SLOTS, inner, hidden, matrices=2), random_blocks(SLOTS, hidden, inner)


def run(
    x: torch.Tensor, w1: ScaledBlocks, w2: ScaledBlocks, rows: experts.Rows, num: int
) -> torch.Tensor:
    _, hidden, inner_size = w2.codes.shape
    inner, y = poison(num, inner_size), poison(num, hidden)
    experts.gate_up(x, w1, rows, inner)
    experts.down(inner, w2, rows, y)
    return y


def expected(x: torch.Tensor, w1: ScaledBlocks, w2: ScaledBlocks, slot: int) -> torch.Tensor:
    gate, up = (x.double() @ dequantised(w1, matrices=2)[slot].T).chunk(2, dim=-1)
    inner = (torch.nn.functional.silu(gate) * up).to(x.dtype).double()
    return inner @ dequantised(w2)[slot].T


def some_slots(rows: int) -> torch.Tensor:
    """Slot 0 has a row of every token but the last, which has no slot."""
    slots = torch.randint(1, SLOTS, (rows, TOP_K), device=DEVICE)
    slots[:, 0] = 0
    slots[-1] = routing.NO_SLOT
    return slots


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
@pytest.mark.parametrize("rows", [3, 90])
def test_each_pair_is_computed_alike_alone_and_in_any_tile(
    rows: int, hidden: int, inner: int
) -> None:
    x, (w1, w2) = random(rows, hidden), weights(hidden, inner)
    slots = some_slots(rows)
    num = (rows - 1) * TOP_K
    alone = run(x, w1, w2, experts.Rows(slots, None), rows * TOP_K)
    assert alone[num:].isnan().all()
    for tile_rows in (16, 32, 64, TALL_ROWS):
        tiles = routing.new_slot_tiles(rows * TOP_K, SLOTS, tile_rows, DEVICE)
        routing.group_by_slot(slots, SLOTS, tiles)
        together = run(x, w1, w2, experts.Rows(slots, tiles), rows * TOP_K)
        assert_same(together[:num], alone[:num])
        assert together[num:].isnan().all()
    for slot in range(SLOTS):
        mine = (slots.view(-1) == slot).nonzero()[:, 0]
        if len(mine):
            assert_close(alone[mine], expected(x[mine // TOP_K], w1, w2, slot))


@pytest.mark.parametrize(
    "tile",
    [
        ScaledTile(64, 4, 3),
        ScaledTile(64, 4, 2, unroll=2),
        ScaledTile(128, 4, 3),
        ScaledTile(128, 8, 2),
    ],
)
def test_a_tiles_shape_changes_no_bit(tile: ScaledTile) -> None:
    rows, hidden, inner = 20, 384, 160
    x, (w1, w2) = random(rows, hidden), weights(hidden, inner)
    lone = experts.Rows(some_slots(rows), None)
    given = []
    for these in (None, tile):
        between, y = poison(rows * TOP_K, inner), poison(rows * TOP_K, hidden)
        scaled_experts.gate_up(x, w1, lone, between, tile=these)
        scaled_experts.down(between, w2, lone, y, tile=these)
        given.append(y[: (rows - 1) * TOP_K])
    assert_same(*given)


@pytest.mark.parametrize("tile_rows", [16, TALL_ROWS])
def test_rows_that_lie_padded_by_slot(tile_rows: int) -> None:
    hidden, inner, width = 256, 128, 150
    counts = ints([0, 130, 20, 1, 3])
    x, (w1, w2) = random(SLOTS * width, hidden), weights(hidden, inner)
    tiles = routing.new_slot_tiles(SLOTS * width, SLOTS, tile_rows, DEVICE)
    routing.fill_padded_tiles(counts, width, tiles)
    rows = experts.Rows(counts, tiles, padded=True)
    y = run(x, w1, w2, rows, SLOTS * width).view(SLOTS, width, hidden)
    x = x.view(SLOTS, width, hidden)
    for slot, count in enumerate(counts.tolist()):
        assert y[slot, count:].isnan().all()
        if count:
            assert_close(y[slot, :count], expected(x[slot, :count], w1, w2, slot))
            alone = torch.full((1, 1), slot, dtype=torch.int64, device=DEVICE)
            last = x[slot, count - 1 : count].contiguous()
            assert_same(run(last, w1, w2, experts.Rows(alone, None), 1)[0], y[slot, count - 1])


@pytest.mark.parametrize("normalise", [True, False])
def test_lone_pairs_choose_for_themselves(normalise: bool) -> None:
    rows, hidden, inner, num_experts = 3, 256, 128, 12
    x, scores = random(rows, hidden), random(rows, num_experts, dtype=torch.float32)
    w1 = random_blocks(SLOTS, inner, hidden, matrices=2)
    slot_of = (torch.arange(num_experts, device=DEVICE) % SLOTS).to(torch.int32)
    slot_of[7] = routing.NO_SLOT
    choice = routing.Choice(scores, slot_of, ints([4, 0, -1]), normalise, 0.7)
    given = []
    for chooses in (True, False):
        slots = torch.full((rows, TOP_K), 99, dtype=torch.int64, device=DEVICE)
        weights_TK = poison(rows, TOP_K, dtype=torch.float32)
        between = poison(rows * TOP_K, inner)
        chosen = experts.FusedChoice(choice, weights_TK) if chooses else None
        if not chooses:
            routing.choose_slots(
                scores, *choice[:3], slots, weights_TK, normalise=normalise, factor=0.7
            )
        experts.gate_up(x, w1, experts.Rows(slots, None), between, chosen=chosen)
        given.append((slots, weights_TK, between.nan_to_num(5.0)))
    for one, other in zip(*given, strict=True):
        assert torch.equal(one, other)
    assert not (given[0][2][:2] == 5.0).all()


def test_every_code_is_widened_to_its_value() -> None:
    """Through the product with a unit vector, so that a sum has one term; NaN is no weight."""
    hidden = inner = 128
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes[[0x7F, 0xFF]] = 0
    w2 = ScaledBlocks(
        codes.repeat(hidden // 2).view(1, hidden, inner).view(torch.float8_e4m3fn),
        torch.full((1, 1, 1), 2.0**-4, device=DEVICE),
    )
    rows = experts.Rows(torch.zeros(inner, 1, dtype=torch.int64, device=DEVICE), None)
    y = poison(inner, hidden)
    experts.down(torch.eye(inner, device=DEVICE).to(y.dtype), w2, rows, y)
    assert torch.equal(y.T.double(), w2.codes[0].double() / 16)


def test_scales_beyond_the_range_of_other_formats_keep_their_place() -> None:
    """Float32 scales are no bfloat16: they are applied to sums, in float32."""
    hidden, inner = 256, 128
    w1, w2 = weights(hidden, inner)
    odd = torch.tensor([1 + 2.0**-12, 2.0**-30], device=DEVICE)
    w2 = replace(w2, scales=w2.scales * odd.view(1, 2, 1))
    x = random(4, hidden)
    rows = experts.Rows(torch.ones(4, 1, dtype=torch.int64, device=DEVICE), None)
    y = run(x, w1, w2, rows, 4)
    exact = expected(x, w1, w2, 1)
    assert_close(y[:, :128], exact[:, :128])
    assert_close(y[:, 128:], exact[:, 128:])
