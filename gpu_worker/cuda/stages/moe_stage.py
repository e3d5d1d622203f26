"""The work between the router and the residual stream, in two layouts: `LocalMoe` on one rank
without an exchange, which copies no rows, and `ExchangedMoe` around an exchange that delivers rows
padded by slot.

All of it may be captured into a CUDA graph: buffers are allocated once and stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.cuda.experts.expert_form import NumberFormat
from gpu_worker.cuda.experts.slots import CudaSlots
from gpu_worker.cuda.kernels import experts, pair_order, residual, routing, scaled_rows
from gpu_worker.cuda.kernels.activation import Epilogue
from gpu_worker.cuda.kernels.tall_experts import TALL_ROWS
from gpu_worker.cuda.stages.side_stream import SideStream

Work = Callable[[], None]

_UNGROUPED_TOKENS_MAX = 4
"""With so few tokens each pair is its own tile, because two tokens seldom share an expert."""
_TILE_ROWS = ((1536, TALL_ROWS), (256, 64), (0, 16))
"""(tokens of a step, rows of its tiles): with many tokens a slot has enough rows for tall tiles."""
_MXFP4_TILE_ROWS = ((1536, TALL_ROWS), (256, 64), (96, 32), (0, 16))
"""Codes are widened once a tile, so that a second one of a slot costs more than empty rows."""
_EXCHANGED_TILE_ROWS, _MXFP4_EXCHANGED_TILE_ROWS = 16, 32
_ORDERED_PAIRS_MIN = 2048
"""With so many pairs, three kernels that count are faster than one that compares all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """A layer's routed tokens. `slots_TK` (int64) are physical slots of the whole instance; -1
    means none. If `choice` is set, slots and weights are not chosen yet: see
    `MoeStage.fuses_routing`."""

    h_TH: Tensor
    slots_TK: Tensor
    weights_TK: Tensor
    choice: routing.Choice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualNorm:
    """`x_out = x + (the output of the MLP)`, `h = norm(x_out)`."""

    x_TH: Tensor
    norm_H: Tensor
    x_out_TH: Tensor
    h_TH: Tensor
    eps: float

    def add(self, parts_PTH: Tensor) -> None:
        """Applies it to an output that is given as parts P."""
        residual.add_norm(self.x_TH, parts_PTH, self.norm_H, self.x_out_TH, self.h_TH, eps=self.eps)


class MoeStage(Protocol):
    """Implemented by `LocalMoe` and `ExchangedMoe`."""

    def fuses_routing(self, num_tokens: int) -> bool:
        """Whether `run` makes the choice itself for so many tokens."""
        ...

    def run(
        self,
        layer: int,
        routed: Routed,
        residual_norm: ResidualNorm,
        overlapped_work: Work | None = None,
    ) -> None:
        """`overlapped_work` adds to `residual_norm.x_TH` before the experts' sum is added. It reads
        `residual_norm.h_TH` and uses buffers of its own."""
        ...


class PaddedExchange(Protocol):
    """Implemented by `ep.exchange.EpExchange`. Its rows have P values, at least the H of a token;
    what those beyond H are means nothing."""

    @property
    def row_size(self) -> int:
        """P."""
        ...

    @property
    def scales(self) -> Tensor | None:
        """The scales of the last dispatch, `[S, M, G]`, one per P / G values. None if its rows are
        not fp8."""
        ...

    def dispatch(self, layer: int, x_TP: Tensor, slots_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(`x_SMP`, `counts_S`): the rows for this rank's slot s are `x_SMP[s, :counts_S[s]]`; the
        rest is undefined."""
        ...

    def combine(self, layer: int, y_SMP: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over K of the results of the matching dispatch's rows, `[T, P]`."""
        ...


class LocalMoe:
    """A single rank that holds every expert. It copies no rows; pairs are ordered by slot."""

    def __init__(
        self, slots: CudaSlots, *, top_k: int, step_tokens_max: int, clamped: bool = False
    ) -> None:
        """`clamped`: see `DecoderSizes.clamped_experts`."""
        self._slots = slots
        self._clamped = clamped
        self._top_k = top_k
        pairs_max = step_tokens_max * top_k
        self._inner_NI, self._y_NH = _row_buffers(slots, pairs_max, slots.form.hidden_size)
        self._tiles: dict[int, routing.SlotTiles] = {}
        self._counts_BS = pair_order.new_block_counts(pairs_max, slots.slots_per_rank, slots.device)

    def fuses_routing(self, num_tokens: int) -> bool:
        return num_tokens <= _UNGROUPED_TOKENS_MAX

    def run(
        self,
        layer: int,
        routed: Routed,
        residual_norm: ResidualNorm,
        overlapped_work: Work | None = None,
    ) -> None:
        if overlapped_work is not None:
            overlapped_work()
        tokens = routed.slots_TK.shape[0]
        pairs = tokens * self._top_k
        rows = experts.Rows(routed.slots_TK, self._group(routed.slots_TK))
        inner_NI, y_NH = self._inner_NI[:pairs], self._y_NH[:pairs]
        w_gate_up, w_down = self._slots.gate_up(layer), self._slots.down(layer)
        chosen = None
        if routed.choice is not None:
            chosen = experts.FusedChoice(routed.choice, routed.weights_TK)
        epilogue = _epilogue(self._slots, layer, clamped=self._clamped)
        experts.gate_up(routed.h_TH, w_gate_up, rows, inner_NI, chosen=chosen, epilogue=epilogue)
        experts.down(inner_NI, w_down, rows, y_NH, epilogue=epilogue)
        residual.add_pairs_norm(
            residual_norm.x_TH,
            y_NH,
            routed.slots_TK,
            routed.weights_TK,
            residual_norm.norm_H,
            residual_norm.x_out_TH,
            residual_norm.h_TH,
            eps=residual_norm.eps,
        )

    def _group(self, slots_TK: Tensor) -> routing.SlotTiles | None:
        tokens = slots_TK.shape[0]
        if tokens <= _UNGROUPED_TOKENS_MAX:
            return None
        num_slots = self._slots.slots_per_rank
        if tokens not in self._tiles:
            heights = _MXFP4_TILE_ROWS if _is_mxfp4(self._slots) else _TILE_ROWS
            tile_rows = next(rows for least, rows in heights if tokens >= least)
            self._tiles[tokens] = routing.new_slot_tiles(
                slots_TK.numel(), num_slots, tile_rows, slots_TK.device
            )
        tiles = self._tiles[tokens]
        if slots_TK.numel() < _ORDERED_PAIRS_MIN:
            routing.group_by_slot(slots_TK, num_slots, tiles)
        else:
            pair_order.order_by_slot(slots_TK, num_slots, self._counts_BS, tiles)
        return tiles


class ExchangedMoe:
    """This rank's slots compute what the exchange delivers, up to M rows per slot. Overlapped work
    is enqueued after dispatch, because the dispatch kernel needs many SMs at once and must get them
    first."""

    def __init__(
        self,
        slots: CudaSlots,
        exchange: PaddedExchange,
        *,
        rows_of_slot: int,
        clamped: bool = False,
    ) -> None:
        """`clamped`: see `DecoderSizes.clamped_experts`."""
        self._slots = slots
        self._clamped = clamped
        self._exchange = exchange
        self._rows_of_slot = rows_of_slot
        num_slots = slots.slots_per_rank
        rows, device = num_slots * rows_of_slot, slots.device
        self._hidden_size = slots.form.hidden_size
        self._inner_NI, self._y_NP = _row_buffers(slots, rows, exchange.row_size)
        height = _MXFP4_EXCHANGED_TILE_ROWS if _is_mxfp4(slots) else _EXCHANGED_TILE_ROWS
        self._tiles = routing.new_slot_tiles(rows, num_slots, height, device)
        self.computed_L = torch.zeros(slots.num_layers, dtype=torch.int32, device=device)
        """Rows that each layer's slots have computed, modulo 2³²."""
        self._side_stream = SideStream(device)

    def fuses_routing(self, num_tokens: int) -> bool:
        """Never, because dispatch needs the slots."""
        return False

    def run(
        self,
        layer: int,
        routed: Routed,
        residual_norm: ResidualNorm,
        overlapped_work: Work | None = None,
    ) -> None:
        self._side_stream.fork()
        x_TP = self._filled_up(routed.h_TH)
        x_SMP, counts_S = self._exchange.dispatch(layer, x_TP, routed.slots_TK)
        if overlapped_work is not None:
            self._side_stream.run(overlapped_work)
        computed_1 = self.computed_L[layer : layer + 1]
        routing.fill_padded_tiles(counts_S, self._rows_of_slot, self._tiles, computed_1)
        rows = experts.Rows(counts_S, self._tiles, padded=True)
        x_NH = self._in_own_type(x_SMP, counts_S)[:, : self._hidden_size]
        y_NH = self._y_NP[:, : self._hidden_size]
        w_gate_up, w_down = self._slots.gate_up(layer), self._slots.down(layer)
        epilogue = _epilogue(self._slots, layer, clamped=self._clamped)
        experts.gate_up(x_NH, w_gate_up, rows, self._inner_NI, epilogue=epilogue)
        experts.down(self._inner_NI, w_down, rows, y_NH, epilogue=epilogue)
        y_SMP = self._y_NP.view(x_SMP.shape)
        y_TP = self._exchange.combine(layer, y_SMP, routed.slots_TK, routed.weights_TK)
        if overlapped_work is not None:
            self._side_stream.join()
        residual_norm.add(y_TP[:, : self._hidden_size].contiguous()[None])

    def _filled_up(self, x_TH: Tensor) -> Tensor:
        """`[T, P]`."""
        missing = self._exchange.row_size - x_TH.shape[1]
        return torch.nn.functional.pad(x_TH, (0, missing)) if missing else x_TH

    def _in_own_type(self, x_SMP: Tensor, counts_S: Tensor) -> Tensor:
        """The rows in the model's dtype, `[S · M, P]`. Rows of fp8 are converted into the buffer of
        the experts' results, which are written only after the last read of the rows."""
        scales_SMG = self._exchange.scales
        if scales_SMG is None:
            return x_SMP.view(-1, x_SMP.shape[-1])
        scaled_rows.dequantise(x_SMP, scales_SMG, counts_S, self._y_NP)
        return self._y_NP


def _is_mxfp4(slots: CudaSlots) -> bool:
    return slots.form.number_format is NumberFormat.MXFP4


def _epilogue(slots: CudaSlots, layer: int, *, clamped: bool) -> Epilogue:
    b_gate_up, b_down = slots.b_gate_up_LSJ, slots.b_down_LSH
    return Epilogue(
        clamped=clamped,
        b_gate_up_SJ=None if b_gate_up is None else b_gate_up[layer],
        b_down_SH=None if b_down is None else b_down[layer],
    )


def _row_buffers(slots: CudaSlots, rows: int, row_size: int) -> tuple[Tensor, Tensor]:
    """Of what gate and up, and down, give for so many rows, the latter in rows of so many
    values."""
    form = slots.form
    inner_NI = torch.empty((rows, form.inner_size), device=slots.device, dtype=form.dtype)
    return inner_NI, inner_NI.new_empty(rows, row_size)


def slot_table(num_layers: int, num_turns: int, num_experts: int, device: torch.device) -> Tensor:
    """`[L, U, E]` int32: the physical slot of the replica of each expert that this rank uses in
    each turn (see `ReplicaChoice`); NO_SLOT if none is live. It is written in place between steps,
    so graphs stay valid with every map."""
    sizes = (num_layers, num_turns, num_experts)
    return torch.full(sizes, routing.NO_SLOT, dtype=torch.int32, device=device)
