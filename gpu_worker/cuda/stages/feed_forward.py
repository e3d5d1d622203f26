"""The part of a layer after attention: routed and shared experts, or a dense MLP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from gpu_worker.cuda.kernels import residual, routing
from gpu_worker.cuda.stages.gated_mlp import GatedMlp
from gpu_worker.cuda.stages.gemm import StepAllocator
from gpu_worker.cuda.stages.moe_stage import MoeStage, ResidualNorm, Routed
from gpu_worker.cuda.stages.step_buffers import StepBuffers
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import MlpWeights, MoeWeights


class FeedForward:
    """For all layers. `slot_of_LUE`, `slots_LTK` and `moe` count only the MoE
    layers."""

    def __init__(
        self,
        sizes: DecoderSizes,
        buffers: StepBuffers,
        slot_of_LUE: Tensor,
        moe: MoeStage,
        allocator: StepAllocator,
    ) -> None:
        self.moe = moe
        self._routing = sizes.routing
        self._buffers = buffers
        self._slot_of_LUE = slot_of_LUE
        self._moe_index = {layer: index for index, layer in enumerate(sizes.moe_layers)}
        self._shared = _mlp(allocator, sizes.hidden_size, sizes.shared_size)
        self._dense = _mlp(allocator, sizes.hidden_size, sizes.dense_size)

    def router(self, mlp: MoeWeights | MlpWeights, tokens: int) -> residual.Router | None:
        """For the norm before this part. None for a dense MLP."""
        if isinstance(mlp, MlpWeights):
            return None
        return residual.Router(mlp.w_router_EH, self._buffers.scores_TE[:tokens], mlp.b_router_E)

    def run(
        self,
        layer: int,
        mlp: MoeWeights | MlpWeights,
        position_T: Tensor,
        residual_norm: ResidualNorm,
    ) -> None:
        """`residual_norm.h_TH` holds the normed stream, and afterwards that of the next part."""
        if isinstance(mlp, MlpWeights):
            assert self._dense is not None, "the sizes know of no dense layer"
            residual_norm.add(self._dense.run(mlp, residual_norm.h_TH))
            return
        index = self._moe_index[layer]
        routed = self._route(index, mlp, position_T, residual_norm.h_TH)
        overlapped_work = (
            None if mlp.shared is None else partial(self._add_shared, mlp.shared, residual_norm)
        )
        self.moe.run(index, routed, residual_norm, overlapped_work)

    def _add_shared(self, weights: MlpWeights, residual_norm: ResidualNorm) -> None:
        assert self._shared is not None, "the sizes know of no shared experts"
        residual.add_parts(residual_norm.x_TH, self._shared.run(weights, residual_norm.h_TH))

    def _route(self, index: int, mlp: MoeWeights, position_T: Tensor, h_TH: Tensor) -> Routed:
        buffers, how, tokens = self._buffers, self._routing, h_TH.shape[0]
        scores_TE = choices_TE = buffers.scores_TE[:tokens]
        routed = Routed(
            h_TH=h_TH,
            slots_TK=buffers.slots_LTK[index, :tokens],
            weights_TK=buffers.weights_TK[:tokens],
        )
        slot_of_UE = self._slot_of_LUE[index]
        if how.sigmoid or how.topk_group < how.num_groups:
            choices_TE = buffers.choices_TE[:tokens]
            routing.score_choices(
                scores_TE,
                mlp.correction_E,
                choices_TE,
                sigmoid=how.sigmoid,
                num_groups=how.num_groups,
                topk_group=how.topk_group,
            )
        elif self.moe.fuses_routing(tokens):
            choice = routing.Choice(scores_TE, slot_of_UE, position_T, how.normalise, how.factor)
            return replace(routed, choice=choice)
        routing.choose_slots(
            scores_TE,
            choices_TE,
            slot_of_UE,
            position_T,
            routed.slots_TK,
            routed.weights_TK,
            normalise=how.normalise,
            sigmoid=how.sigmoid,
            factor=how.factor,
            chosen_E=buffers.chosen_LE[index],
        )
        return routed


def _mlp(allocator: StepAllocator, hidden_size: int, inner_size: int) -> GatedMlp | None:
    if not inner_size:
        return None
    return GatedMlp(allocator, hidden_size=hidden_size, inner_size=inner_size)
