"""The half of a layer after attention: routed and shared experts, or a dense MLP."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from gpu_worker.cuda.kernels import residual, routing
from gpu_worker.cuda.stages.gated_mlp import GatedMlp
from gpu_worker.cuda.stages.gemm import StepRoom
from gpu_worker.cuda.stages.moe_stage import MoeStage, Onward, Routed
from gpu_worker.cuda.stages.step_buffers import StepBuffers
from gpu_worker.cuda.weights.decoder_sizes import DecoderSizes
from gpu_worker.cuda.weights.decoder_weights import MlpWeights, MoeWeights


class FeedForward:
    """Of all layers. `slot_of_LE` and `slots_LTK` count MoE layers alone, as `moe` does."""

    def __init__(
        self,
        sizes: DecoderSizes,
        buffers: StepBuffers,
        slot_of_LE: Tensor,
        moe: MoeStage,
        room: StepRoom,
    ) -> None:
        self.moe = moe
        self._routing = sizes.routing
        self._buffers = buffers
        self._slot_of_LE = slot_of_LE
        self._moe_index = {layer: index for index, layer in enumerate(sizes.moe_layers)}
        self._shared = _mlp(room, sizes.hidden_size, sizes.shared_size)
        self._dense = _mlp(room, sizes.hidden_size, sizes.dense_size)

    def router(self, mlp: MoeWeights | MlpWeights, tokens: int) -> tuple[Tensor, Tensor] | None:
        """(weights, where its scores go) for the norm before this half."""
        if isinstance(mlp, MlpWeights):
            return None
        return mlp.w_router_EH, self._buffers.scores_TE[:tokens]

    def run(
        self, layer: int, mlp: MoeWeights | MlpWeights, position_T: Tensor, onward: Onward
    ) -> None:
        """`onward.h_TH` holds the normed stream, and then what comes after."""
        if isinstance(mlp, MlpWeights):
            assert self._dense is not None, "the sizes know of no dense layer"
            parts_PTH = self._dense.run(mlp, onward.h_TH)
            residual.add_norm(
                onward.x_TH,
                parts_PTH,
                onward.norm_H,
                onward.x_out_TH,
                onward.h_TH,
                eps=onward.eps,
            )
            return
        index = self._moe_index[layer]
        routed = self._route(index, mlp, position_T, onward.h_TH)
        beside = None if mlp.shared is None else partial(self._add_shared, mlp.shared, onward)
        self.moe.run(index, routed, onward, beside)

    def _add_shared(self, weights: MlpWeights, onward: Onward) -> None:
        assert self._shared is not None, "the sizes know of no shared experts"
        residual.add_parts(onward.x_TH, self._shared.run(weights, onward.h_TH))

    def _route(self, index: int, mlp: MoeWeights, position_T: Tensor, h_TH: Tensor) -> Routed:
        buffers, how, tokens = self._buffers, self._routing, h_TH.shape[0]
        scores_TE = choices_TE = buffers.scores_TE[:tokens]
        routed = Routed(
            h_TH=h_TH,
            slots_TK=buffers.slots_LTK[index, :tokens],
            weights_TK=buffers.weights_TK[:tokens],
        )
        slot_of_E = self._slot_of_LE[index]
        if how.sigmoid or how.kept < how.num_groups:
            choices_TE = buffers.choices_TE[:tokens]
            routing.score_choices(
                scores_TE,
                mlp.correction_E,
                choices_TE,
                sigmoid=how.sigmoid,
                num_groups=how.num_groups,
                kept=how.kept,
            )
        elif self.moe.chooses(tokens):
            choice = routing.Choice(scores_TE, slot_of_E, position_T, how.normalise, how.factor)
            return replace(routed, choice=choice)
        routing.choose_slots(
            scores_TE,
            choices_TE,
            slot_of_E,
            position_T,
            routed.slots_TK,
            routed.weights_TK,
            normalise=how.normalise,
            sigmoid=how.sigmoid,
            factor=how.factor,
        )
        return routed


def _mlp(room: StepRoom, hidden_size: int, inner_size: int) -> GatedMlp | None:
    if not inner_size:
        return None
    return GatedMlp(room, hidden_size=hidden_size, inner_size=inner_size)
