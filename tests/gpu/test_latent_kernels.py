"""Compares the kernels of latent attention and the choice among expert groups with plain torch in
float64, and checks batch invariance to the bit. Runs on a CUDA device in bf16; elsewhere on
Triton's interpreter in float32."""

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

from gpu_worker.cuda.kernels import latent, residual, routing
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.splits import Partials

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(1e-2 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
HEADS, RANK, ROTATED, PLAIN, Q_RANK = 5, 64, 32, 48, 96
BLOCK_TOKENS, BLOCKS = 16, 40
SCALE = (PLAIN + ROTATED) ** -0.5
EPS = 1e-6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def paging(positions: list[int], sequences: list[int], blocks: int = BLOCKS) -> Paging:
    tables = torch.randperm(3 * blocks, device=DEVICE).view(3, blocks).to(torch.int32)
    return Paging(ints(positions), ints(sequences), tables, None, 1)


def poisoned_beyond(where: Paging, lengths: list[int]) -> latent.LatentCache:
    """Sequence s has `lengths[s]` positions. What comes after them must not be read."""
    blocks = where.tables_SB.numel()
    cache = latent.LatentCache(
        poison(blocks, BLOCK_TOKENS, RANK), poison(blocks, BLOCK_TOKENS, ROTATED)
    )
    for sequence, length in enumerate(lengths):
        at = torch.arange(length, device=DEVICE)
        blocks = where.tables_SB[sequence].long()[at // BLOCK_TOKENS]
        cache.latent_BUR[blocks, at % BLOCK_TOKENS] = random(length, RANK)
        cache.key_BUW[blocks, at % BLOCK_TOKENS] = random(length, ROTATED)
    return cache


def attend(
    q: torch.Tensor, q_rotated: torch.Tensor, cache: latent.LatentCache, where: Paging, at_once: int
) -> torch.Tensor:
    context = where.tables_SB.shape[1] * BLOCK_TOKENS
    splits = (at_once, HEADS, latent.num_splits(context))
    partials = Partials(
        poison(*splits, RANK, dtype=torch.float32),
        poison(*splits, dtype=torch.float32),
        poison(*splits, dtype=torch.float32),
    )
    out = poison(q.shape[0], HEADS, RANK)
    latent.attend_latents(q, q_rotated, cache, where, partials, out, scale=SCALE)
    return out


def attention_reference(
    q: torch.Tensor, q_rotated: torch.Tensor, cache: latent.LatentCache, where: Paging, row: int
) -> torch.Tensor:
    length = int(where.position_T[row]) + 1
    blocks = where.tables_SB[int(where.sequence_T[row])].long()
    latents = cache.latent_BUR[blocks].reshape(-1, RANK)[:length].double()
    keys = cache.key_BUW[blocks].reshape(-1, ROTATED)[:length].double()
    scores = q[row].double() @ latents.T + q_rotated[row].double() @ keys.T
    return (scores * SCALE).softmax(-1) @ latents


def test_attention_follows_its_formula_over_any_number_of_splits() -> None:
    where = paging([0, 255, 256, -1, 600, 31], [0, 1, 1, 0, 2, 2])
    cache = poisoned_beyond(where, [1, 257, 601])
    q, q_rotated = random(6, HEADS, RANK), random(6, HEADS, ROTATED)
    out = attend(q, q_rotated, cache, where, at_once=6)
    for row in (0, 1, 2, 4, 5):
        assert_close(out[row], attention_reference(q, q_rotated, cache, where, row))
    assert not out[3].any(), "a row without a token gives zero"


def test_splits_grow_with_a_rows_own_context_alone() -> None:
    edge = latent.SPLIT_TOKENS * latent.SPLITS_MAX
    positions = [edge - 1, edge, 20]
    where = paging(positions, [0, 1, 2], blocks=2 * edge // BLOCK_TOKENS + 1)
    cache = poisoned_beyond(where, [position + 1 for position in positions])
    q, q_rotated = random(3, HEADS, RANK), random(3, HEADS, ROTATED)
    out = attend(q, q_rotated, cache, where, at_once=3)
    for row in range(3):
        assert_close(out[row], attention_reference(q, q_rotated, cache, where, row))
    shorter = where._replace(tables_SB=where.tables_SB[:, : edge // BLOCK_TOKENS + 1].contiguous())
    assert_same(attend(q, q_rotated, cache, shorter, at_once=3), out)


def test_a_rows_attention_does_not_depend_on_the_rows_beside_it() -> None:
    where = paging([300, 301, 302, 17, 520], [0, 0, 0, 1, 2])
    cache = poisoned_beyond(where, [303, 18, 521])
    q, q_rotated = random(5, HEADS, RANK), random(5, HEADS, ROTATED)
    together = attend(q, q_rotated, cache, where, at_once=8)
    in_slices = attend(q, q_rotated, cache, where, at_once=2)
    assert torch.equal(together, in_slices)
    for row in range(5):
        own = slice(row, row + 1)
        alone = where._replace(
            position_T=where.position_T[own].clone(), sequence_T=where.sequence_T[own].clone()
        )
        assert_same(attend(q[own], q_rotated[own], cache, alone, at_once=1)[0], together[row])


def turn(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    x = x.double()
    low, high = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = angles.double().cos(), angles.double().sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("q_lora_rank", [Q_RANK, 0])
def test_latents_are_normed_and_stored_and_queries_normed(
    interleaved: bool, q_lora_rank: int
) -> None:
    where = paging([40, 3, -1], [1, 0, 2])
    columns = (q_lora_rank or 7) + RANK + ROTATED
    parts = random(4, 3, columns, dtype=torch.float32)
    q_norm, kv_norm = random(Q_RANK), random(RANK)
    angles = torch.rand(64, ROTATED // 2, device=DEVICE) * 6
    rotation = latent.Rotation(angles.cos(), angles.sin(), interleaved)
    cache = latent.LatentCache(
        random(3 * BLOCKS, BLOCK_TOKENS, RANK), random(3 * BLOCKS, BLOCK_TOKENS, ROTATED)
    )
    before = cache.latent_BUR.clone()
    q = poison(3, q_lora_rank) if q_lora_rank else None
    latent.norm_and_store(
        parts, q_norm if q_lora_rank else None, kv_norm, rotation, where, q, cache, eps=EPS
    )
    whole = parts.double().sum(0)
    if q is not None:
        assert_close(q, normed(whole[:, :q_lora_rank], q_norm))
    for row in (0, 1):
        position = int(where.position_T[row])
        block = int(where.tables_SB[int(where.sequence_T[row]), position // BLOCK_TOKENS])
        own = whole[row, -RANK - ROTATED :]
        assert_close(cache.latent_BUR[block, position % BLOCK_TOKENS], normed(own[:RANK], kv_norm))
        rotated_out = turn(own[RANK:], angles[position], interleaved)
        assert_close(cache.key_BUW[block, position % BLOCK_TOKENS], rotated_out)
    assert int((cache.latent_BUR != before).any(-1).sum()) == 2, "a row without a token stores none"


@pytest.mark.parametrize("rows", [2, 40])
def test_queries_go_into_the_latent_space_head_by_head(rows: int) -> None:
    size = PLAIN + ROTATED
    q = random(2, rows, HEADS * size + 3, dtype=torch.float32)
    w = random(HEADS, RANK, PLAIN)
    out, rotated_out = poison(rows, HEADS, RANK), poison(rows, HEADS, ROTATED)
    latent.multiply_heads(q, latent.HeadColumns(0, size), w, out)
    angles = torch.rand(64, ROTATED // 2, device=DEVICE) * 6
    position = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    rotation = latent.Rotation(angles.cos(), angles.sin(), True)
    latent.rotate_queries(q, rotation, position, latent.HeadColumns(PLAIN, size), rotated_out)
    heads = q.sum(0)[:, : HEADS * size].view(rows, HEADS, size)
    plain = heads[..., :PLAIN].to(DTYPE).double()
    assert_close(out, torch.einsum("taf,arf->tar", plain, w.double()))
    assert_close(rotated_out, turn(heads[..., PLAIN:], angles[position.long(), None], True))
    alone = poison(1, HEADS, RANK)
    last = q[:, -1:].contiguous()
    latent.multiply_heads(last, latent.HeadColumns(0, size), w, alone)
    assert_same(alone[0], out[-1])


@pytest.mark.parametrize(
    ("experts", "num_groups", "topk_group", "sigmoid"),
    [(64, 8, 3, True), (60, 3, 2, False), (32, 1, 1, True)],
)
def test_experts_come_from_the_best_groups(
    experts: int, num_groups: int, topk_group: int, sigmoid: bool
) -> None:
    rows, top_k, factor = 7, 4, 2.5
    scores = random(rows, experts, dtype=torch.float32)
    scores[0, :] = 0.5  # nothing but ties: the lowest groups and experts
    correction = torch.randn(experts, device=DEVICE) * 0.3 if sigmoid else None
    if correction is not None:
        correction[: experts // 2] = 0.0
    choices = poison(rows, experts, dtype=torch.float32)
    routing.score_choices(
        scores, correction, choices, sigmoid=sigmoid, num_groups=num_groups, topk_group=topk_group
    )
    slots = torch.full((rows, top_k), -7, dtype=torch.int64, device=DEVICE)
    weights = poison(rows, top_k, dtype=torch.float32)
    slot_of = torch.randperm(experts, device=DEVICE).to(torch.int32)
    position = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    routing.choose_slots(
        scores,
        choices,
        slot_of,
        position,
        slots,
        weights,
        normalise=sigmoid,
        sigmoid=sigmoid,
        factor=factor,
    )
    for row in range(rows):
        values = scores[row].sigmoid() if sigmoid else scores[row].softmax(-1)
        choice = (values if correction is None else values + correction).double()
        by_group = choice.view(num_groups, -1)
        counts = by_group.sort(-1, descending=True).values[:, : 2 if sigmoid else 1].sum(-1)
        best = counts.sort(descending=True, stable=True).indices[:topk_group]
        allowed = torch.isin(torch.arange(num_groups, device=DEVICE), best)
        masked = by_group.masked_fill(~allowed[:, None], -torch.inf).view(-1)
        chosen = masked.sort(descending=True, stable=True).indices[:top_k]
        own = values[chosen].double()
        assert slots[row].tolist() == slot_of[chosen].tolist()
        assert_close(weights[row], factor * (own / own.sum() if sigmoid else own), 1e-6)


def test_parts_are_added_in_place() -> None:
    x, parts = random(3, 1500, dtype=torch.float32), random(4, 3, 1500, dtype=torch.float32)
    wanted = x.double() + parts.double().sum(0)
    residual.add_parts(x, parts)
    assert_close(x, wanted, 1e-6)
