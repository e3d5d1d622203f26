"""What only some families ask of kernels: biases, other norms and rotations of heads, bounds, and
gpt-oss's activation. Compares with plain torch in float64, and tiles with each other to the bit.
Runs on a CUDA device in bf16; elsewhere on Triton's interpreter in float32."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from tests.support.cuda_values import DEVICE, DTYPE, ON_CUDA, Closeness, ints, poison, random

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, QK_NORM_NONE, QK_NORM_WHOLE
from gpu_worker.cuda.kernels import experts, residual, routing, tall_experts
from gpu_worker.cuda.kernels.activation import Epilogue
from gpu_worker.cuda.kernels.paging import Paging
from gpu_worker.cuda.kernels.projected_heads import QkvParts, norm_scales, rotate_and_store

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(6e-3 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
EPS = 1e-5
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 6, 2, 32, 16
HIDDEN, INNER, SLOTS, TOP_K = 128, 64, 4, 2


class HeadForm(NamedTuple):
    norm: int = QK_NORM_HEAD
    rotated: int = HEAD_DIM
    biased: bool = False
    clip: float = 0.0


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "form",
    [
        HeadForm(),
        HeadForm(norm=QK_NORM_NONE),
        HeadForm(norm=QK_NORM_NONE, biased=True),
        HeadForm(rotated=HEAD_DIM // 2, biased=True),
        HeadForm(norm=QK_NORM_WHOLE, clip=0.8),
        HeadForm(norm=QK_NORM_WHOLE, biased=True),
    ],
    ids=str,
)
def test_heads_get_bias_norm_bound_and_rotation_in_this_order(form: HeadForm) -> None:
    positions, columns = [5, 40, 17], (HEADS + 2 * KV_HEADS) * HEAD_DIM
    rows = len(positions)
    where = Paging(
        ints(positions),
        ints(list(range(rows))),
        torch.arange(3 * rows, dtype=torch.int32, device=DEVICE).view(rows, 3),
        None,
        1,
    )
    parts = random(4, rows, columns, dtype=torch.float32)
    angles = torch.arange(64, device=DEVICE)[:, None] / 3.0 ** torch.arange(
        form.rotated // 2, device=DEVICE
    )
    sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM}
    shared = {} if form.norm == QK_NORM_WHOLE else dict.fromkeys(sizes, HEAD_DIM)
    norms = {name: random(shared.get(name, size)) for name, size in sizes.items()}
    if form.norm == QK_NORM_NONE:
        norms = {}
    bias = random(columns, dtype=torch.float32) if form.biased else None
    scales = poison(rows, 2, dtype=torch.float32) if form.norm == QK_NORM_WHOLE else None
    given = QkvParts(
        parts,
        norms.get("q"),
        norms.get("k"),
        angles.cos().float(),
        angles.sin().float(),
        EPS,
        bias_C=bias,
        scales_T2=scales,
        clip=form.clip,
    )
    assert given.norm == form.norm
    if scales is not None:
        norm_scales(given, q_size=sizes["q"], kv_size=sizes["k"])
    q = poison(rows, HEADS, HEAD_DIM)
    k, v = (poison(3 * rows, KV_HEADS, BLOCK_TOKENS, HEAD_DIM) for _ in range(2))
    rotate_and_store(given, where, q, k, v)

    x = parts.double().sum(0) + (0.0 if bias is None else bias.double())
    queries, keys, values = x.split([sizes["q"], sizes["k"], sizes["k"]], dim=1)

    def finished(x: torch.Tensor, name: str) -> torch.Tensor:
        heads = x.view(rows, -1, HEAD_DIM)
        if form.norm == QK_NORM_HEAD:
            heads = normed(heads, norms[name])
        elif form.norm == QK_NORM_WHOLE:
            heads = normed(x, norms[name]).view(rows, -1, HEAD_DIM)
        heads = bounded(heads, form.clip)
        low, high = heads[..., : form.rotated].chunk(2, dim=-1)
        cos, sin = (t[where.position_T.long()][:, None].double() for t in given[3:5])
        turned = [low * cos - high * sin, high * cos + low * sin, heads[..., form.rotated :]]
        return torch.cat(turned, dim=-1)

    assert_close(q, finished(queries, "q"))
    blocks = where.tables_SB[torch.arange(rows), where.position_T.long() // BLOCK_TOKENS].long()
    offsets = where.position_T.long() % BLOCK_TOKENS
    assert_close(k[blocks, :, offsets], finished(keys, "k"))
    assert_close(v[blocks, :, offsets], bounded(values, form.clip).view(rows, KV_HEADS, HEAD_DIM))


def normed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w.double()


def bounded(x: torch.Tensor, clip: float) -> torch.Tensor:
    return x.clamp(-clip, clip) if clip else x


@pytest.mark.parametrize("rows", [2, 11])
def test_the_residual_and_the_router_take_biases(rows: int) -> None:
    """Whether the scores come with the norm or after it."""
    x, parts = random(rows, HIDDEN, dtype=torch.float32), random(4, rows, HIDDEN).float()
    w_norm, w_router, num_experts = random(HIDDEN), random(12, HIDDEN), 12
    bias, b_router = (random(n, dtype=torch.float32) for n in (HIDDEN, num_experts))
    x_out, h = poison(rows, HIDDEN, dtype=torch.float32), poison(rows, HIDDEN)
    scores = poison(rows, num_experts, dtype=torch.float32)
    router = residual.Router(w_router, scores, b_router)
    residual.add_norm(x, parts, w_norm, x_out, h, eps=EPS, bias_H=bias, router=router)
    total = x.double() + parts.double().sum(0) + bias.double()
    assert_close(x_out, total, 1e-6)
    assert_close(h, normed(total, w_norm))
    assert_close(scores, h.double() @ w_router.double().T + b_router.double(), 1e-5)


def test_biased_experts_with_the_clamped_activation_compute_alike_in_all_tiles() -> None:
    rows = 200 if ON_CUDA else 40
    x = random(rows, HIDDEN, scale=3.0)
    w1, w2 = random(SLOTS, 2 * INNER, HIDDEN, scale=0.3), random(SLOTS, HIDDEN, INNER)
    epilogue = Epilogue(
        clamped=True,
        b_gate_up_SJ=random(SLOTS, 2 * INNER),
        b_down_SH=random(SLOTS, HIDDEN),
    )
    slots = torch.randint(0, SLOTS, (rows, TOP_K), device=DEVICE)
    slots[: rows // 2, 0] = 1  # enough for a tall tile
    given = {}
    for tile_rows in (0, 16, 64, tall_experts.TALL_ROWS):
        tiles = None
        if tile_rows:
            tiles = routing.new_slot_tiles(rows * TOP_K, SLOTS, tile_rows, DEVICE)
            routing.group_by_slot(slots, SLOTS, tiles)
        work = experts.Rows(slots, tiles)
        inner, y = poison(rows * TOP_K, INNER), poison(rows * TOP_K, HIDDEN)
        experts.gate_up(x, w1, work, inner, epilogue=epilogue)
        experts.down(inner, w2, work, y, epilogue=epilogue)
        given[tile_rows] = y
    for y in given.values():
        assert_same(y, given[0])
    assert_close(
        given[0], torch.stack([expert(x, w1, w2, epilogue, slots, n) for n in range(len(y))])
    )


def expert(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    epilogue: Epilogue,
    slots: torch.Tensor,
    pair: int,
) -> torch.Tensor:
    assert epilogue.b_gate_up_SJ is not None
    assert epilogue.b_down_SH is not None
    slot = int(slots.flatten()[pair])
    sums = x[pair // TOP_K].double() @ w1[slot].double().T + epilogue.b_gate_up_SJ[slot].double()
    gate, up = sums.chunk(2)
    assert bool((sums.abs() > 7.0).any()), "nothing is clamped"
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    inner = ((up + 1.0) * gate * torch.sigmoid(1.702 * gate)).to(DTYPE).double()
    return inner @ w2[slot].double().T + epilogue.b_down_SH[slot].double()
