"""Shared experts that run beside an exchange give the same bits as before it, also in a graph,
which they run in as a parallel path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.support.cuda_values import DEVICE, DTYPE, ON_CUDA, ints, poison, random

pytest.importorskip("triton", reason="Triton is not installed: there is no CUDA device here")

if not ON_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gpu_worker.checkpoint.gqa_shape import QK_NORM_HEAD, GqaShape
from gpu_worker.checkpoint.rope import Rope
from gpu_worker.cuda.experts.expert_form import NumberFormat
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.kernels import residual
from gpu_worker.cuda.stages.feed_forward import FeedForward
from gpu_worker.cuda.stages.gated_mlp import GatedMlp
from gpu_worker.cuda.stages.gemm import StepAllocator
from gpu_worker.cuda.stages.moe_stage import ExchangedMoe, LocalMoe, MoeStage, ResidualNorm
from gpu_worker.cuda.stages.step_buffers import StepBuffers
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import MlpWeights, MoeWeights
from tests.support.cuda_steps import LoopbackExchange

pytestmark = pytest.mark.gpu

HIDDEN, EXPERTS, SHARED, TOKENS, EPS = 128, 8, 64, 6, 1e-6
SIZES = DecoderSizes(
    num_layers=2,
    hidden_size=HIDDEN,
    attention=GqaShape(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=QK_NORM_HEAD),
    rope=Rope(theta=1e6, kind="default", scaling={}, context_tokens_max=128),
    moe_layers=(0, 1),
    num_experts=EXPERTS,
    top_k=2,
    inner_size=64,
    vocab_size=256,
    shared_size=SHARED,
)
ROOM = StepAllocator(tokens_max=TOKENS, invariant=True, device=DEVICE, dtype=DTYPE)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Halves:
    """The feed-forward parts of two layers; the second takes the output of the first. The inputs
    are `h_TH` and `x_TH[0]`, and the outputs `h_TH` and `x_TH[2]`."""

    def __init__(self, moe: MoeStage) -> None:
        self.buffers = StepBuffers(SIZES, ROOM, rows_max=TOKENS, num_ranks=0)
        slot_of_LUE = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE).repeat(2, 1, 1)
        self.forward = FeedForward(SIZES, self.buffers, slot_of_LUE, moe, ROOM)
        self.h_TH = poison(TOKENS, HIDDEN)
        self.x_TH = [poison(TOKENS, HIDDEN, dtype=torch.float32) for _ in range(3)]

    def take(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.h_TH.copy_(random(TOKENS, HIDDEN))
        self.x_TH[0].copy_(random(TOKENS, HIDDEN))
        self.buffers.scores_TE.copy_(random(TOKENS, EXPERTS))

    def run(self, layer: int, mlp: MoeWeights, position_T: torch.Tensor) -> None:
        residual_norm = ResidualNorm(
            x_TH=self.x_TH[layer],
            norm_H=mlp.w_router_EH[0],
            x_out_TH=self.x_TH[layer + 1],
            h_TH=self.h_TH,
            eps=EPS,
        )
        self.forward.run(layer, mlp, position_T, residual_norm)

    def given(self) -> torch.Tensor:
        return torch.stack([self.x_TH[2], self.h_TH.float()])


def layer_weights() -> MoeWeights:
    return MoeWeights(
        w_router_EH=random(EXPERTS, HIDDEN),
        shared=MlpWeights(
            w_gate_up_JH=random(2 * SHARED, HIDDEN, scale=0.1),
            w_down_HI=random(HIDDEN, SHARED, scale=0.1),
        ),
    )


def filled_slots(number_format: NumberFormat = NumberFormat.PLAIN) -> CudaSlots:
    slots = CudaSlots(
        num_layers=2,
        slots_per_rank=EXPERTS,
        hidden_size=HIDDEN,
        inner_size=SIZES.inner_size,
        device=DEVICE,
        dtype=DTYPE,
        number_format=number_format,
    )
    slots.fill_randomly(EXPERTS, std=0.1)
    return slots


def around_an_exchange(slots: CudaSlots) -> MoeStage:
    return around_an_exchange_of(slots, row_size=HIDDEN)


def around_an_exchange_of(slots: CudaSlots, *, row_size: int) -> MoeStage:
    exchange = LoopbackExchange(EXPERTS, TOKENS, row_size)
    return ExchangedMoe(slots, exchange, rows_of_slot=TOKENS)


def on_one_rank(slots: CudaSlots) -> MoeStage:
    return LocalMoe(slots, top_k=SIZES.top_k, step_tokens_max=TOKENS)


@pytest.mark.parametrize("number_format", NumberFormat)
def test_rows_that_are_filled_up_give_the_same_bits(number_format: NumberFormat) -> None:
    slots, layers = filled_slots(number_format), [layer_weights(), layer_weights()]
    exact, wide = (
        Halves(around_an_exchange_of(slots, row_size=row_size)) for row_size in (HIDDEN, 2 * HIDDEN)
    )
    for halves in (exact, wide):
        halves.take(1)
        for layer, mlp in enumerate(layers):
            halves.run(layer, mlp, ints([3, 0, 1, -1, 7, 2]))
    assert exact.given().isfinite().all()
    assert torch.equal(exact.given(), wide.given())


@pytest.mark.parametrize("number_format", NumberFormat)
@pytest.mark.parametrize("stage", [around_an_exchange, on_one_rank])
def test_shared_experts_come_before_the_routed_ones_to_the_bit(
    stage: Callable[[CudaSlots], MoeStage], number_format: NumberFormat
) -> None:
    slots, layers = filled_slots(number_format), [layer_weights(), layer_weights()]
    both, apart = Halves(stage(slots)), Halves(stage(slots))
    shared = GatedMlp(ROOM, hidden_size=HIDDEN, inner_size=SHARED)
    position_T = ints([3, 0, 1, -1, 7, 2])
    both.take(1)
    apart.take(1)
    for layer, mlp in enumerate(layers):
        both.run(layer, mlp, position_T)
        assert mlp.shared is not None
        residual.add_parts(apart.x_TH[layer], shared.run(mlp.shared, apart.h_TH))
        apart.run(layer, replace(mlp, shared=None), position_T)
    assert both.given().isfinite().all()
    assert torch.equal(both.given(), apart.given())


@pytest.mark.skipif(not ON_CUDA, reason="needs CUDA graphs")
def test_a_graph_with_shared_experts_as_a_branch_gives_the_bits_of_one_stream() -> None:
    slots, layers = filled_slots(), [layer_weights(), layer_weights()]
    branched, plain = Halves(around_an_exchange(slots)), Halves(around_an_exchange(slots))
    shared = GatedMlp(ROOM, hidden_size=HIDDEN, inner_size=SHARED)
    position_T = ints([3, 0, 1, -1, 7, 2])

    def run() -> None:
        for layer, mlp in enumerate(layers):
            branched.run(layer, mlp, position_T)

    branched.take(0)
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(1, 20):
        branched.take(seed)
        graph.replay()
        plain.take(seed)
        for layer, mlp in enumerate(layers):
            assert mlp.shared is not None
            residual.add_parts(plain.x_TH[layer], shared.run(mlp.shared, plain.h_TH))
            plain.run(layer, replace(mlp, shared=None), position_T)
        assert torch.equal(branched.given(), plain.given())
