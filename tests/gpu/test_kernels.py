"""Compares every kernel with plain torch in float64, and checks batch invariance to the bit. Runs
on a CUDA device in bf16; elsewhere on Triton's interpreter in float32, if Triton is installed and
TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.cuda_values import (
    DEVICE,
    DTYPE,
    ON_CUDA,
    Closeness,
    ints,
    poison,
    random,
)

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.cuda.kernels import (
    attention,
    expert_rows,
    experts,
    linear,
    projected_heads,
    residual,
    routing,
    sampling,
    scaled_rows,
    splits,
)
from gpu_worker.cuda.sampling_inputs import BANNED_MAX

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(6e-3 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
HIDDEN, INNER, EXPERTS, TOP_K = 256, 64, 32, 4
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 8, 2, 64, 16
SPLIT = attention.SPLIT_TOKENS
EPS = 1e-6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_linear_parts_sum_to_the_product_whatever_the_rows_beside(rows: int) -> None:
    x, w = random(rows, HIDDEN), random(96, HIDDEN)
    out = poison(4, rows, 96, dtype=torch.float32)
    linear.linear_parts(x, w, out)
    assert_close(out.sum(0), x.double() @ w.double().T)
    alone = poison(4, 1, 96, dtype=torch.float32)
    linear.linear_parts(x[-1:].contiguous(), w, alone)
    assert_same(alone[:, 0], out[:, -1])


@pytest.mark.parametrize("rows", [1, 20, 70])
def test_the_tile_of_a_product_changes_no_bit(rows: int) -> None:
    x, w = random(rows, 1024), random(48, 1024)
    one, other = (poison(4, rows, 48, dtype=torch.float32) for _ in range(2))
    linear.linear_parts(x, w, one)
    linear.linear_parts(x, w, other, tile=linear.LinearTile(32, 32, 64, 4, 3))
    assert_close(one.sum(0), x.double() @ w.double().T)
    assert_same(one, other)


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w.double()


@pytest.mark.parametrize("rows", [1, 3, 19])
def test_residual_norm_and_router_follow_their_formulas(rows: int) -> None:
    x, parts = random(rows, HIDDEN, dtype=torch.float32), random(4, rows, HIDDEN)
    w_norm, w_router = random(HIDDEN), random(EXPERTS, HIDDEN)
    x_out, h = poison(rows, HIDDEN, dtype=torch.float32), poison(rows, HIDDEN)
    scores = poison(rows, EXPERTS, dtype=torch.float32)
    residual.add_norm(x, parts, w_norm, x_out, h, eps=EPS, router=residual.Router(w_router, scores))
    total = x.double() + parts.double().sum(0)
    assert_close(x_out, total, 1e-6)
    assert_close(h, norm(total, w_norm))
    assert_close(scores, h.double() @ w_router.double().T, 1e-5)
    alone = poison(1, EXPERTS, dtype=torch.float32)
    last = parts[:, -1:].contiguous()
    residual.add_norm(
        x[-1:].contiguous(),
        last,
        w_norm,
        x_out[:1],
        h[:1],
        eps=EPS,
        router=residual.Router(w_router, alone),
    )
    assert_same(alone[0], scores[-1])


def test_embedding_of_a_token_or_of_the_former_steps_is_read_and_normed() -> None:
    table, w_norm = random(50, HIDDEN), random(HIDDEN)
    x, h = poison(3, HIDDEN, dtype=torch.float32), poison(3, HIDDEN)
    residual.embed_norm(ints([7, -3, 49]), ints([1, 2, 30]), table, w_norm, x, h, eps=EPS)
    assert torch.equal(x, table[[7, 30, 49]].float())
    assert_close(h, norm(x, w_norm))


def test_pairs_without_a_slot_add_nothing() -> None:
    x, y = random(2, HIDDEN, dtype=torch.float32), random(2 * TOP_K, HIDDEN)
    weights, w_norm = torch.rand(2, TOP_K, device=DEVICE), random(HIDDEN)
    slots = torch.arange(2 * TOP_K, device=DEVICE).view(2, TOP_K)
    slots[1, 2] = routing.NO_SLOT
    y[TOP_K + 2] = float("nan")
    x_out, h = poison(2, HIDDEN, dtype=torch.float32), poison(2, HIDDEN)
    residual.add_pairs_norm(x, y, slots, weights, w_norm, x_out, h, eps=EPS)
    terms = weights.double()[:, :, None] * y.double().view(2, TOP_K, HIDDEN)
    assert_close(x_out, x.double() + terms.nan_to_num().sum(1), 1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_router_chooses_the_top_k_and_masks_padding_rows(normalise: bool) -> None:
    scores = random(3, EXPERTS, dtype=torch.float32)
    slot_of = torch.randperm(EXPERTS, device=DEVICE).to(torch.int32)
    slots = torch.full((3, TOP_K), 99, dtype=torch.int64, device=DEVICE)
    weights = poison(3, TOP_K, dtype=torch.float32)
    routing.choose_slots(
        scores, scores, slot_of, ints([4, 0, -1]), slots, weights, normalise=normalise
    )
    top, chosen = scores.double().softmax(-1).topk(TOP_K)
    if normalise:
        top = top / top.sum(-1, keepdim=True)
    assert_close(weights[:2], top[:2], 1e-6)
    assert torch.equal(slots[:2], slot_of[chosen[:2]].long())
    assert slots[2].tolist() == [routing.NO_SLOT] * TOP_K


def test_rows_take_the_turns_of_the_replica_choice_and_are_counted() -> None:
    scores = random(5, EXPERTS, dtype=torch.float32)
    slot_of = torch.arange(3 * EXPERTS, device=DEVICE, dtype=torch.int32).view(3, EXPERTS)
    slots = torch.full((5, TOP_K), 99, dtype=torch.int64, device=DEVICE)
    weights, positions = poison(5, TOP_K, dtype=torch.float32), ints([4, 0, 3, -1, 2])
    counted = torch.zeros(EXPERTS, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        routing.choose_slots(
            scores, scores, slot_of, positions, slots, weights, normalise=True, chosen_E=counted
        )
    chosen = scores.topk(TOP_K).indices
    for row in (0, 1, 2, 4):
        assert torch.equal(slots[row], slot_of[row % 3][chosen[row]].long())
    of_tokens = chosen[[0, 1, 2, 4]].flatten()
    assert torch.equal(counted.long(), 2 * torch.bincount(of_tokens, minlength=EXPERTS))


def test_rows_that_lie_padded_by_slot_are_counted() -> None:
    counts, counted = ints([0, 3, 20, 0, 1, *[0] * (EXPERTS - 5)]), ints([5])
    tiles = routing.new_slot_tiles(EXPERTS * 24, EXPERTS, 16, DEVICE)
    for _ in range(2):
        routing.fill_padded_tiles(counts, 24, tiles, counted)
    assert counted.tolist() == [5 + 2 * 24]


def random_slots(rows: int) -> torch.Tensor:
    slots = torch.stack([torch.randperm(EXPERTS, device=DEVICE)[:TOP_K] for _ in range(rows)])
    slots[-1] = routing.NO_SLOT
    return slots


@pytest.mark.parametrize("rows", [2, 40, 150])
def test_tiles_cover_every_pair_once_by_slot(rows: int) -> None:
    slots = random_slots(rows)
    slots[: rows // 2, 0] = 3  # one slot with several tiles
    tiles = routing.new_slot_tiles(rows * TOP_K, EXPERTS, 16, DEVICE)
    routing.group_by_slot(slots, EXPERTS, tiles)
    seen = []
    for slot, first, count in tiles.tiles_C3[: int(tiles.num_tiles_1)].tolist():
        assert 0 < count <= 16
        pairs = tiles.order_N[first : first + count].tolist()
        assert all(slots.view(-1)[pair] == slot for pair in pairs)
        seen += pairs
    assert sorted(seen) == torch.nonzero(slots.view(-1) >= 0).view(-1).tolist()


def expert_reference(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, slot: int
) -> torch.Tensor:
    gate, up = (x.double() @ w1[slot].double().T).chunk(2, dim=-1)
    inner = (torch.nn.functional.silu(gate) * up).to(DTYPE).double()
    return inner @ w2[slot].double().T


def run_experts(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, rows: experts.Rows, num: int
) -> torch.Tensor:
    inner, y = poison(num, INNER), poison(num, HIDDEN)
    experts.gate_up(x, w1, rows, inner)
    experts.down(inner, w2, rows, y)
    return y


@pytest.mark.parametrize("rows", [3, 40])
def test_experts_compute_each_pair_alike_alone_and_grouped(rows: int) -> None:
    x = random(rows, HIDDEN)
    w1, w2 = random(EXPERTS, 2 * INNER, HIDDEN, scale=0.1), random(EXPERTS, HIDDEN, INNER)
    slots = random_slots(rows)
    pairs = [experts.Rows(slots, None)]
    for tile_rows in (16, 32):
        tiles = routing.new_slot_tiles(rows * TOP_K, EXPERTS, tile_rows, DEVICE)
        routing.group_by_slot(slots, EXPERTS, tiles)
        pairs.append(experts.Rows(slots, tiles))
    alone, by16, by32 = (run_experts(x, w1, w2, p, rows * TOP_K) for p in pairs)
    num = (rows - 1) * TOP_K
    assert_same(alone[:num], by16[:num])
    assert_same(alone[:num], by32[:num])
    reference = torch.stack(
        [expert_reference(x[n // TOP_K], w1, w2, int(slots.view(-1)[n])) for n in range(num)]
    )
    assert_close(alone[:num], reference)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("num_experts", [EXPERTS, 24])
def test_lone_pairs_choose_for_themselves_as_the_choice_before_them_does(
    num_experts: int, normalise: bool
) -> None:
    rows, w1 = 3, random(EXPERTS, 2 * INNER, HIDDEN, scale=0.1)
    x, scores = random(rows, HIDDEN), random(rows, num_experts, dtype=torch.float32)
    scores[0, 5:9] = 7.0  # ties
    slot_of = torch.randperm(EXPERTS, device=DEVICE)[:num_experts].to(torch.int32)
    slot_of[7] = routing.NO_SLOT
    choice = routing.Choice(scores, slot_of, ints([4, 0, -1]), normalise, 0.7)
    given = []
    for chooses in (True, False):
        slots = torch.full((rows, TOP_K), 99, dtype=torch.int64, device=DEVICE)
        weights, inner = poison(rows, TOP_K, dtype=torch.float32), poison(rows * TOP_K, INNER)
        chosen = experts.FusedChoice(choice, weights) if chooses else None
        if not chooses:
            routing.choose_slots(
                scores, *choice[:3], slots, weights, normalise=normalise, factor=0.7
            )
        experts.gate_up(x, w1, experts.Rows(slots, None), inner, chosen=chosen)
        given.append((slots, weights, inner.nan_to_num(5.0)))
    for one, other in zip(*given, strict=True):
        assert torch.equal(one, other)
    assert routing.NO_SLOT in given[0][0][0].tolist()
    assert given[0][0][2].tolist() == [routing.NO_SLOT] * TOP_K


@pytest.mark.parametrize("programs", [1, 3, 1024])
def test_experts_take_rows_that_lie_padded_by_slot(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of programs that share the tiles."""
    monkeypatch.setattr(expert_rows, "_PADDED_PROGRAMS", programs)
    counts, width = ints([0, 3, 20, 0, 1, *[0] * (EXPERTS - 5)]), 24
    x = random(EXPERTS * width, HIDDEN)
    w1, w2 = random(EXPERTS, 2 * INNER, HIDDEN, scale=0.1), random(EXPERTS, HIDDEN, INNER)
    tiles = routing.new_slot_tiles(EXPERTS * width, EXPERTS, 16, DEVICE)
    routing.fill_padded_tiles(counts, width, tiles)
    rows = experts.Rows(counts, tiles, padded=True)
    y = run_experts(x, w1, w2, rows, EXPERTS * width)
    for slot, count in ((1, 3), (2, 20), (4, 1)):
        mine = slice(slot * width, slot * width + count)
        assert_close(y[mine], expert_reference(x[mine], w1, w2, slot))


@pytest.mark.parametrize("groups", [3, 8])
def test_rows_of_fp8_are_widened_where_a_slot_has_them_and_nowhere_else(groups: int) -> None:
    counts, width, hidden = ints([0, 24, 5, 1]), 24, 128 * groups
    codes = torch.randint(0, 256, (4, width, hidden), dtype=torch.uint8, device=DEVICE)
    codes[(codes + 1) % 128 == 0] = 0  # no number: never sent
    x = codes.view(torch.float8_e4m3fn)
    scales = torch.rand(4, groups, width, device=DEVICE).transpose(1, 2)
    out = poison(4 * width, hidden)
    scaled_rows.dequantise(x, scales, counts, out)
    expected = (x.float() * scales.repeat_interleave(128, dim=2)).to(DTYPE)
    for slot, count in enumerate(counts.tolist()):
        rows = out.view(4, width, hidden)[slot]
        assert torch.equal(rows[:count], expected[slot, :count])
        assert rows[count:].isnan().all()


def rotations(context: int) -> tuple[torch.Tensor, torch.Tensor]:
    powers = 10_000.0 ** (torch.arange(0, HEAD_DIM, 2, device=DEVICE) / HEAD_DIM)
    angles = torch.arange(context, device=DEVICE)[:, None] / powers[None, :]
    return angles.cos(), angles.sin()


def paging(lengths: list[int], new: list[int], tile_tokens: int) -> attention.Paging:
    """Sequence s has `lengths[s]` positions, of which the last `new[s]` are this step's tokens."""
    position, sequence, tiles = [], [], []
    for s, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for first in range(0, count, tile_tokens):
            tiles.append([len(position) + first, min(tile_tokens, count - first)])
        position += range(length - count, length)
        sequence += [s] * count
    blocks = 16
    tables = torch.randperm(len(lengths) * blocks, device=DEVICE).view(-1, blocks)
    return attention.Paging(
        ints(position),
        ints(sequence),
        tables.to(torch.int32),
        torch.tensor(tiles, dtype=torch.int32, device=DEVICE) if tile_tokens > 1 else None,
        tile_tokens,
    )


def cache(sequences: int) -> torch.Tensor:
    return random(sequences * 16, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)


def partials(rows: int, parts_max: int = 16 * BLOCK_TOKENS // SPLIT) -> splits.Partials:
    places = (rows, HEADS, parts_max)
    return splits.Partials(
        poison(*places, HEAD_DIM, dtype=torch.float32),
        poison(*places, dtype=torch.float32),
        poison(*places, dtype=torch.float32),
    )


def run_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    where: attention.Paging,
    kind: splits.WindowAndSinks = splits.SEES_ALL,
) -> torch.Tensor:
    out = poison(q.shape[0], HEADS * HEAD_DIM)
    attention.attend(q, k, v, where, partials(q.shape[0]), out, kind=kind)
    return out


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    where: attention.Paging,
    kind: splits.WindowAndSinks = splits.SEES_ALL,
) -> torch.Tensor:
    out = []
    for row in range(q.shape[0]):
        length = int(where.position_T[row]) + 1
        blocks = where.tables_SB[int(where.sequence_T[row])].long()
        heads = []
        for head in range(HEADS):
            kv_head = head * KV_HEADS // HEADS
            seen = slice(max(0, length - (kind.window or length)), length)
            keys = k[blocks, kv_head].reshape(-1, HEAD_DIM)[seen].double()
            values = v[blocks, kv_head].reshape(-1, HEAD_DIM)[seen].double()
            scores = keys @ q[row, head].double() * HEAD_DIM**-0.5
            if kind.sinks_Q is not None:
                sink = kind.sinks_Q[head].double() / attention.LOG2_E
                scores = torch.cat([scores, sink[None]])
            heads.append(scores.softmax(0)[: len(values)] @ values)
        out.append(torch.cat(heads))
    return torch.stack(out)


def test_decode_attention_follows_its_formula_and_padding_rows_give_zero() -> None:
    where = paging([1, 64, 65, 200], [1, 1, 1, 1], 1)
    q, k, v = random(4, HEADS, HEAD_DIM), cache(4), cache(4)
    out = run_attention(q, k, v, where)
    assert_close(out, attention_reference(q, k, v, where))
    where.position_T[1] = -1
    again = run_attention(q, k, v, where)
    assert torch.equal(again[[0, 2, 3]], out[[0, 2, 3]])
    assert not again[1].any()


@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 130])
def test_a_row_sees_its_window_and_sinks_take_a_share(window: int) -> None:
    """What lies before the window is never merged: its splits are not computed, though other rows
    of a tile may be."""
    where = paging([1, 64, 65, 200], [1, 1, 1, 1], 1)
    q, k, v = random(4, HEADS, HEAD_DIM), cache(4), cache(4)
    kind = splits.WindowAndSinks(window, 3.0 * random(HEADS, dtype=torch.float32))
    out = run_attention(q, k, v, where, kind)
    assert_close(out, attention_reference(q, k, v, where, kind))
    without = splits.WindowAndSinks(window)
    assert_close(
        run_attention(q, k, v, where, without), attention_reference(q, k, v, where, without)
    )


def test_prefill_attention_gives_the_bits_of_decode() -> None:
    lengths, new = [70, 131], [6, 9]
    q, k, v = random(15, HEADS, HEAD_DIM), cache(2), cache(2)
    torch.manual_seed(1)
    chunk = paging(lengths, new, 4)
    torch.manual_seed(1)
    single = paging(lengths, new, 1)
    out = run_attention(q, k, v, chunk)
    assert_close(out, attention_reference(q, k, v, chunk))
    assert_same(out, run_attention(q, k, v, single))
    for row in (0, 14):
        alone = single._replace(
            position_T=single.position_T[row : row + 1], sequence_T=single.sequence_T[row : row + 1]
        )
        assert_same(run_attention(q[row : row + 1], k, v, alone)[0], out[row])


def test_queries_and_keys_are_normed_rotated_and_stored() -> None:
    where = paging([40, 3], [2, 1], 1)
    heads = HEADS + 2 * KV_HEADS
    qkv = random(4, 3, heads * HEAD_DIM, dtype=torch.float32)
    q_norm, k_norm = random(HEAD_DIM), random(HEAD_DIM)
    cos, sin = rotations(64)
    q, k, v = poison(3, HEADS, HEAD_DIM), cache(2), cache(2)
    k_before = k.clone()
    qkv_parts = projected_heads.QkvParts(qkv, q_norm, k_norm, cos, sin, EPS)
    projected_heads.rotate_and_store(qkv_parts, where, q, k, v)
    x = qkv.double().sum(0).view(3, heads, HEAD_DIM)

    def rotate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        low, high = norm(x, w).chunk(2, dim=-1)
        c, s = (t.double()[where.position_T.long()][:, None] for t in (cos, sin))
        return torch.cat([low * c - high * s, high * c + low * s], dim=-1)

    assert_close(q, rotate(x[:, :HEADS], q_norm))
    blocks = where.tables_SB[
        where.sequence_T.long(), where.position_T.long() // BLOCK_TOKENS
    ].long()
    offsets = where.position_T.long() % BLOCK_TOKENS
    assert_close(k[blocks, :, offsets], rotate(x[:, HEADS : HEADS + KV_HEADS], k_norm))
    assert_close(v[blocks, :, offsets], x[:, HEADS + KV_HEADS :])
    assert int((k != k_before).any(-1).sum()) == 3 * KV_HEADS


@pytest.mark.parametrize(
    ("span", "programs", "window"), [(16, 2048, 0), (16, 1, 0), (2, 2048, 0), (2, 1, 0), (2, 1, 70)]
)
def test_attention_all_by_itself_gives_the_bits_of_three_kernels(
    span: int, programs: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if one program computes several splits and spans are merged. The old content of a new
    token's cache row is never seen. The counts of arrivals are zero again."""
    tile = attention.ATTENTION_TILE._replace(programs=programs)
    monkeypatch.setattr(attention, "ATTENTION_TILE", tile)
    monkeypatch.setattr(attention, "SPAN", span)
    monkeypatch.setattr(splits, "SPAN", span)
    where = paging([1, 64, 65, 200], [1, 1, 1, 1], 1)
    where.position_T[1] = -1
    qkv = random(4, 4, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float32)
    qkv_parts = projected_heads.QkvParts(
        qkv, random(HEAD_DIM), random(HEAD_DIM), *rotations(256), EPS
    )
    kind = splits.WindowAndSinks(window, random(HEADS, dtype=torch.float32) if window else None)
    k, v = cache(4), cache(4)
    for row in (0, 2, 3):
        at = int(where.position_T[row])
        block = where.tables_SB[row, at // BLOCK_TOKENS]
        k[block, :, at % BLOCK_TOKENS] = v[block, :, at % BLOCK_TOKENS] = float("nan")
    arrivals = torch.zeros(4, KV_HEADS, 1 + 4 // min(span, 4), dtype=torch.int32, device=DEVICE)
    merging = attention.MergeBuffers(partials(4, 4 // min(span, 4)), arrivals)
    given = []
    for rows_max in (4, 4, 3):
        monkeypatch.setattr(attention, "FUSED_ATTENTION_ROWS_MAX", rows_max)
        keys, values, out = k.clone(), v.clone(), poison(4, HEADS * HEAD_DIM)
        q, room = poison(4, HEADS, HEAD_DIM), partials(4)
        attention.attend_projected(qkv_parts, where, q, keys, values, room, merging, out, kind=kind)
        assert bool(q.isnan().all()) == (rows_max == 4)
        assert not arrivals.any()
        splits_of_rows = (of_split[[0, 2, 3]].nan_to_num() for of_split in room)
        given.append((out, keys, values, *splits_of_rows))
    for one, again, other in zip(*given, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, again)
        assert torch.equal(one, other)
    assert not given[0][0][1].any()


def draws(rows: int, **of: list[float]) -> sampling.Draws:
    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(of.get(name, [default] * rows), dtype=dtype, device=DEVICE)

    return sampling.Draws(
        column("temperature", 0.0, torch.float32),
        column("top_p", 1.0, torch.float32),
        column("top_k", 0, torch.int32),
        column("uniform", 0.0, torch.float32),
        torch.full((rows, BANNED_MAX), -1, dtype=torch.int32, device=DEVICE),
    )


def sample(logits: torch.Tensor, how: sampling.Draws) -> list[int]:
    ids = torch.full((logits.shape[0],), -7, dtype=torch.int32, device=DEVICE)
    sampling.sample_rows(logits, how, ids)
    return ids.tolist()


def test_greedy_takes_the_lowest_of_the_largest_that_is_not_banned() -> None:
    logits = random(4, 5000, dtype=torch.float32)
    logits[0, [17, 4999]] = 9.0
    logits[1, 4998] = 9.0
    logits[2, 4998] = 9.0
    logits[3] = float("nan")
    how = draws(4)
    how.banned_TX[2, 0] = 4998
    best = logits[2].argsort(descending=True)[1].item()
    assert sample(logits, how) == [17, 4998, best, -1]


def test_a_draw_inverts_the_distribution_that_top_k_and_top_p_leave() -> None:
    probabilities = torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05], device=DEVICE)
    uniform = [0.0, 0.39, 0.41, 0.46, 0.76, 0.999]
    logits = probabilities.log().repeat(len(uniform), 1).contiguous()
    ones = [1.0] * len(uniform)
    plain = draws(len(uniform), temperature=ones, uniform=uniform)
    assert sample(logits, plain) == [0, 0, 1, 2, 3, 4]
    by_k = draws(len(uniform), temperature=ones, uniform=uniform, top_k=[2] * len(uniform))
    assert sample(logits, by_k) == [0, 0, 0, 0, 2, 2]
    by_p = draws(len(uniform), temperature=ones, uniform=uniform, top_p=[0.6] * len(uniform))
    assert sample(logits, by_p) == [0, 0, 0, 0, 2, 2]


def test_draws_over_a_large_vocabulary_follow_its_cumulated_weights() -> None:
    logits = random(1, 20_000, dtype=torch.float32)
    cumulated = (logits[0].double() / 0.7).softmax(0).cumsum(0)
    for uniform in (0.1, 0.5, 0.9):
        chosen = sample(logits, draws(1, temperature=[0.7], uniform=[uniform]))[0]
        assert cumulated[chosen - 1] - 1e-4 < uniform < cumulated[chosen] + 1e-4
