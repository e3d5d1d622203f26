"""Compares the kernels of large steps with those of decode, to the bit: a token that is computed
again after a death, in a chunk, must be what it was. Runs on a CUDA device in bf16; elsewhere on
Triton's interpreter in float32, if Triton is installed and TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.cuda_values import DEVICE, ON_CUDA, Closeness, ints, poison, random

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.cuda.kernels import (
    attention,
    chunk_attention,
    experts,
    linear,
    pair_order,
    residual,
    routing,
    splits,
    tall_experts,
)

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(6e-3 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
HIDDEN, INNER, SLOTS, TOP_K = 128, 64, 4, 2
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 8, 1, 64, 16


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("tile", linear._WHOLE_TILES)
@pytest.mark.parametrize(("rows", "columns", "parts"), [(70, 80, 4), (130, 272, 4), (130, 80, 1)])
def test_a_whole_product_is_the_sum_of_its_parts(
    rows: int, columns: int, parts: int, tile: linear.LinearTile
) -> None:
    x, w = random(rows, 256), random(columns, 256)
    in_parts = poison(parts, rows, columns, dtype=torch.float32)
    linear.linear_parts(x, w, in_parts)
    whole = poison(rows, columns, dtype=torch.float32)
    linear.linear_whole(x, w, whole, parts=parts, tile=tile)
    added = torch.zeros_like(whole)
    for part in in_parts:
        added += part
    assert_same(whole, added)
    assert_close(whole, x.double() @ w.double().T)


def test_the_residual_takes_a_whole_product_as_it_takes_its_parts() -> None:
    x, parts, w_norm = random(3, HIDDEN, dtype=torch.float32), random(4, 3, HIDDEN), random(HIDDEN)
    parts = parts.float()
    given = []
    for form in (parts, (((parts[0] + parts[1]) + parts[2]) + parts[3])[None]):
        x_out, h = poison(3, HIDDEN, dtype=torch.float32), poison(3, HIDDEN)
        residual.add_norm(x, form.contiguous(), w_norm, x_out, h, eps=1e-6)
        given.append((x_out, h))
    assert torch.equal(given[0][0], given[1][0])
    assert torch.equal(given[0][1], given[1][1])


@pytest.mark.parametrize("rows", [21, 300])
def test_a_row_has_the_routers_scores_of_a_decode_among_any_number_of_rows(rows: int) -> None:
    num_experts = 16
    if rows > 100 and not ON_CUDA:
        pytest.skip("the interpreter takes minutes for sums of several operands")
    x, parts = random(rows, HIDDEN, dtype=torch.float32), random(1, rows, HIDDEN).float()
    w_norm, w_router = random(HIDDEN), random(num_experts, HIDDEN)

    def scores_of(these: slice) -> torch.Tensor:
        mine, part = x[these].contiguous(), parts[:, these].contiguous()
        x_out, h = torch.empty_like(mine), random(*mine.shape)
        scores = poison(len(mine), num_experts, dtype=torch.float32)
        residual.add_norm(
            mine, part, w_norm, x_out, h, eps=1e-6, router=residual.Router(w_router, scores)
        )
        return scores

    many = scores_of(slice(None))
    for row in (0, 3, 17, rows - 1):
        assert_same(scores_of(slice(row, row + 1))[0], many[row])


@pytest.mark.parametrize(("rows", "num_slots"), [(37, 9), (140, 60)])
def test_pairs_are_ordered_as_by_comparing_them_all(rows: int, num_slots: int) -> None:
    slots = torch.randint(-1, num_slots, (rows, TOP_K), device=DEVICE)
    slots[: rows // 2, 0] = 3  # a slot with many
    compared, counted = (
        routing.new_slot_tiles(slots.numel(), num_slots, 16, DEVICE) for _ in range(2)
    )
    routing.group_by_slot(slots, num_slots, compared)
    room = pair_order.new_block_counts(2 * slots.numel(), num_slots, DEVICE)
    pair_order.order_by_slot(slots, num_slots, room, counted)
    num = int(compared.num_tiles_1)
    assert torch.equal(counted.order_N, compared.order_N)
    assert int(counted.num_tiles_1) == num
    assert torch.equal(counted.tiles_C3[:num], compared.tiles_C3[:num])


def test_tall_tiles_give_each_pair_the_bits_that_it_has_alone() -> None:
    """Tiles that are more and less than half full, and pairs without a slot."""
    rows = 70
    x = random(rows, HIDDEN)
    w1, w2 = random(SLOTS, 2 * INNER, HIDDEN, scale=0.1), random(SLOTS, HIDDEN, INNER)
    slots = torch.stack([torch.zeros(rows, device=DEVICE), torch.full((rows,), 2.0, device=DEVICE)])
    slots = slots.T.long().contiguous()  # slot 0 has more than half a tile
    slots[40:, 1] = 3  # slot 3 has less
    slots[-1] = routing.NO_SLOT
    tiles = routing.new_slot_tiles(rows * TOP_K, SLOTS, tall_experts.TALL_ROWS, DEVICE)
    routing.group_by_slot(slots, SLOTS, tiles)
    alone, tall = (
        run_experts(x, w1, w2, experts.Rows(slots, given), rows * TOP_K) for given in (None, tiles)
    )
    num = (rows - 1) * TOP_K
    assert_same(tall[:num], alone[:num])
    assert tall[num:].isnan().all()


def test_tall_tiles_take_rows_that_lie_padded_by_slot() -> None:
    counts, width = ints([0, 130, 20, 1]), 150
    x = random(SLOTS * width, HIDDEN)
    w1, w2 = random(SLOTS, 2 * INNER, HIDDEN, scale=0.1), random(SLOTS, HIDDEN, INNER)
    given = []
    for tile_rows in (16, tall_experts.TALL_ROWS):
        tiles = routing.new_slot_tiles(SLOTS * width, SLOTS, tile_rows, DEVICE)
        routing.fill_padded_tiles(counts, width, tiles)
        rows = experts.Rows(counts, tiles, padded=True)
        given.append(run_experts(x, w1, w2, rows, SLOTS * width).view(SLOTS, width, -1))
    for slot, count in enumerate(counts.tolist()):
        if count:
            assert_same(given[0][slot, :count], given[1][slot, :count])
        assert given[1][slot, count:].isnan().all()


def run_experts(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, rows: experts.Rows, num: int
) -> torch.Tensor:
    inner, y = poison(num, INNER), poison(num, HIDDEN)
    experts.gate_up(x, w1, rows, inner)
    experts.down(inner, w2, rows, y)
    return y


@pytest.mark.parametrize("window", [0, 20, 100])
@pytest.mark.parametrize("span", [2, 16])
def test_a_chunk_attends_to_the_bits_of_decode(
    span: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences: one that begins, one whose chunk follows a long context over several spans,
    beside a single row. Rows of a tile see windows that begin in different splits."""
    sinks = None if not window else random(HEADS, dtype=torch.float32)
    kind = splits.WindowAndSinks(window, sinks)
    monkeypatch.setattr(splits, "SPAN", span)
    monkeypatch.setattr(chunk_attention, "SPAN", span)
    positions = [*range(3), *range(205, 217), 250]
    sequence = [0] * 3 + [1] * 12 + [2]
    blocks = 16
    tables = torch.randperm(3 * blocks, device=DEVICE).view(3, blocks).to(torch.int32)
    cache = (3 * blocks, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    q, k, v = random(len(positions), HEADS, HEAD_DIM), random(*cache), random(*cache)
    tile_tokens = chunk_attention.chunk_tile_tokens(HEADS, KV_HEADS)
    starts = [(0, 3), (3, 12), (15, 1)]
    tiles = [
        [first + at, min(tile_tokens, count - at)]
        for first, count in starts
        for at in range(0, count, tile_tokens)
    ]
    tiles.append([0, 0])  # unused
    single = attention.Paging(ints(positions), ints(sequence), tables, None, 1)
    chunks = single._replace(
        tiles_C2=torch.tensor(tiles, dtype=torch.int32, device=DEVICE), tile_tokens=tile_tokens
    )
    by_split, merged = (
        poison(len(positions), HEADS * HEAD_DIM),
        poison(*q.shape, dtype=torch.float32),
    )
    room = splits.new_partials(len(positions), HEADS, 4, HEAD_DIM, DEVICE)
    attention.attend(q, k, v, single, room, by_split, kind=kind)
    spans = splits.spans_view(room, -(-4 // span))
    for apart in (None, spans):
        out = poison(len(positions), HEADS * HEAD_DIM)
        chunk_attention.attend_chunks(q, k, v, chunks, merged, out, kind=kind, spans=apart)
        assert_same(out, by_split)
