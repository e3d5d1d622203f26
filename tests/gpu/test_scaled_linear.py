"""Shared weights in block-scaled FP8: compared with their dequantised values in float64, and the
bits of a row alone with those among few and many. Runs on a CUDA device in bf16; elsewhere on
Triton's interpreter in float32, if Triton is installed and TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.cuda_values import DEVICE, DTYPE, ON_CUDA, Closeness, poison, random
from tests.support.scaled_values import dequantised, random_blocks

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.cuda.kernels import linear, scaled_linear
from gpu_worker.cuda.kernels.scaled_operands import ScaledTile
from gpu_worker.cuda.stages.gated_mlp import GatedMlp
from gpu_worker.cuda.stages.gemm import Gemm, StepAllocator
from gpu_worker.cuda.weights.decoder_weights import MlpWeights
from gpu_worker.cuda.weights.scaled_blocks import ScaledBlocks

pytestmark = pytest.mark.gpu

_CLOSENESS = Closeness(6e-3 if ON_CUDA else 2e-6)
assert_close, assert_same = _CLOSENESS.assert_close, _CLOSENESS.assert_same
MANY = 300 if ON_CUDA else 260


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def weights(rows: int, columns: int, *, matrices: int = 1) -> tuple[ScaledBlocks, torch.Tensor]:
    """Also in float64."""
    blocks = random_blocks(1, rows, columns, matrices=matrices)
    exact = dequantised(blocks, matrices=matrices)[0]
    return ScaledBlocks(blocks.codes[0], blocks.scales[0]), exact


def added(parts: torch.Tensor) -> torch.Tensor:
    """In their order."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


@pytest.mark.parametrize(
    ("columns", "inner", "parts"), [(80, 512, 4), (272, 1024, 4), (64, 144, 1), (200, 48, 1)]
)
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_a_whole_product_is_the_sum_of_its_parts(
    rows: int, columns: int, inner: int, parts: int
) -> None:
    """For parts of one block, of several, and products without parts, whose last block is
    partial."""
    x, (w, exact) = random(rows, inner), weights(columns, inner)
    in_parts = poison(parts, rows, columns, dtype=torch.float32)
    linear.linear_parts(x, w, in_parts)
    assert_close(in_parts.sum(0), x.double() @ exact.T)
    whole = poison(rows, columns, dtype=torch.float32)
    linear.linear_whole(x, w, whole, parts=parts)
    assert_same(whole, added(in_parts))
    alone = poison(parts, 1, columns, dtype=torch.float32)
    linear.linear_parts(x[-1:].contiguous(), w, alone)
    assert_same(alone[:, 0], in_parts[:, -1])


@pytest.mark.parametrize("tile", [ScaledTile(64, 4, 2, unroll=2), ScaledTile(128, 4, 3)])
def test_a_tiles_shape_changes_no_bit(tile: ScaledTile) -> None:
    x, (w, _) = random(20, 1024), weights(272, 1024)
    one, other = (poison(4, 20, 272, dtype=torch.float32) for _ in range(2))
    scaled_linear.linear_parts(x, w, one)
    scaled_linear.linear_parts(x, w, other, tile=tile)
    assert_same(one, other)


@pytest.mark.parametrize("invariant", [True, False])
def test_a_step_multiplies_them_whether_or_not_it_is_invariant(invariant: bool) -> None:
    allocator = StepAllocator(tokens_max=MANY, invariant=invariant, device=DEVICE, dtype=DTYPE)
    gemm = Gemm(allocator, inner=512, columns=80)
    x, (w, exact) = random(MANY, 512), weights(80, 512)
    for rows in (3, MANY):
        out = gemm.run(x[:rows], w)
        assert out.dtype == (torch.float32 if invariant else DTYPE)
        assert_close(out.double().sum(0), x[:rows].double() @ exact.T)


@pytest.mark.parametrize("inner", [128, 208])
def test_a_gated_mlp_computes_a_row_alike_among_any_number(inner: int) -> None:
    hidden = 256
    allocator = StepAllocator(tokens_max=MANY, invariant=True, device=DEVICE, dtype=DTYPE)
    mlp = GatedMlp(allocator, hidden_size=hidden, inner_size=inner)
    (gate_up, exact_up), (_, plain_down) = (
        weights(inner, hidden, matrices=2),
        weights(hidden, inner),
    )
    own = MlpWeights(w_gate_up_JH=gate_up, w_down_HI=plain_down.to(DTYPE))
    x = random(MANY, hidden)
    last = added(mlp.run(own, x[:1]))[0]
    for rows in (20, 40, 70, MANY):
        assert_same(added(mlp.run(own, x[:rows]))[0], last)
    gate, up = (x[:70].double() @ exact_up.T).chunk(2, dim=-1)
    between = (torch.nn.functional.silu(gate) * up).to(DTYPE).double()
    assert_close(mlp.run(own, x[:70]).sum(0), between @ plain_down.to(DTYPE).double().T)
