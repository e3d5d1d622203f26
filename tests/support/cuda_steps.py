"""Runs steps of a CUDA decoder for tests, in which sequence s owns the blocks from `s ·
BLOCKS_EACH` on. Also exchanges of one rank that pad rows by slot."""

from __future__ import annotations

import numpy as np
import torch

from gpu_worker.cuda.decoder import Decoder
from gpu_worker.engine.step_batch import StepBatch

BLOCK_TOKENS, BLOCKS_EACH = 16, 6


def step(
    decoder: Decoder, chunks: dict[int, list[int]], starts: list[int]
) -> tuple[np.ndarray, torch.Tensor]:
    """The next token of each sequence, and the logits it comes from."""
    pending = decoder.launch(batch_of(chunks, starts))
    return pending.ids(), pending.logits_RV.float().clone()


def batch_of(chunks: dict[int, list[int]], starts: list[int]) -> StepBatch:
    lengths = [len(chunk) for chunk in chunks.values()]
    return StepBatch(
        token_ids_T=np.concatenate([np.array(c, dtype=np.int32) for c in chunks.values()]),
        position_T=np.concatenate(
            [np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, lengths, strict=True)]
        ),
        sequence_T=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        block_tables_SB=np.array(
            [np.arange(BLOCKS_EACH) + s * BLOCKS_EACH for s in chunks], dtype=np.int32
        ),
        logits_rows_R=np.cumsum(lengths, dtype=np.int32) - 1,
    )


def continue_alone(
    decoder: Decoder, tokens: list[int], *, chunk: int, more: int, sequence: int = 0
) -> tuple[list[int], torch.Tensor]:
    for start in range(0, len(tokens), chunk):
        ids, logits = step(decoder, {sequence: tokens[start : start + chunk]}, [start])
    new, all_logits = [int(ids[0])], [logits[0]]
    for _ in range(more):
        position = len(tokens) + len(new) - 1
        ids, logits = step(decoder, {sequence: new[-1:]}, [position])
        new.append(int(ids[0]))
        all_logits.append(logits[0])
    return new, torch.stack(all_logits)


def continue_in_a_crowd(
    decoder: Decoder, tokens: list[int], neighbours: tuple[list[int], list[int]], *, more: int
) -> tuple[list[int], torch.Tensor]:
    """The same in two chunks beside two other sequences: (new tokens, their logits but the
    first's)."""
    one, other = neighbours
    step(decoder, {1: one}, [0])
    step(decoder, {0: tokens[:10], 1: [5], 2: other}, [0, len(one), 0])
    ids, _ = step(decoder, {0: tokens[10:]}, [10])
    new, logits = [int(ids[0])], []
    for n in range(more):
        starts = [len(tokens) + n, len(one) + 1 + n, len(other) + n]
        ids, rows = step(decoder, {0: new[-1:], 1: [7 + n], 2: [9 + n]}, starts)
        new.append(int(ids[0]))
        logits.append(rows[0])
    return new, torch.stack(logits)


class LoopbackExchange:
    """An exchange of one rank with the layout of Mooncake's EP, by plain indexing. It reads nothing
    on the host, so that graphs may capture it."""

    def __init__(self, num_slots: int, rows_of_slot: int, row_size: int) -> None:
        self.num_slots, self.rows_of_slot, self.row_size = num_slots, rows_of_slot, row_size
        self.scales: torch.Tensor | None = None
        self.layers: list[int] = []
        # Row of each pair of the last dispatch among all slots' rows; one past them means none.
        self.row_TK = torch.empty(0)

    def dispatch(
        self, layer: int, x_TH: torch.Tensor, slots_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert x_TH.shape[1] == self.row_size
        self.layers.append(layer)
        counts_S = self._place(slots_TK)
        return self.pad(x_TH), counts_S

    def combine(
        self, layer: int, y_SMH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        y_NH = y_SMH.flatten(0, 1).float()
        y_NH = torch.cat([y_NH, y_NH.new_zeros(1, y_NH.shape[1])])
        y_TH = torch.zeros(slots_TK.shape[0], y_SMH.shape[2], device=y_SMH.device)
        for row_T, weight_T in zip(self.row_TK.T, weights_TK.T, strict=True):
            y_TH += weight_T[:, None] * y_NH[row_T]
        return y_TH.to(y_SMH.dtype)

    def pad(self, values_TV: torch.Tensor) -> torch.Tensor:
        """The rows of each slot, `[S, M, V]`; rows without a token are NaN."""
        num_rows = self.num_slots * self.rows_of_slot
        shape = (num_rows + 1, values_TV.shape[1])
        padded_NV = torch.full(shape, float("nan"), device=values_TV.device)
        padded_NV[self.row_TK.flatten()] = values_TV.float().repeat_interleave(
            self.row_TK.shape[1], dim=0
        )
        padded_NV = padded_NV[:num_rows].to(values_TV.dtype)
        return padded_NV.view(self.num_slots, self.rows_of_slot, -1)

    def _place(self, slots_TK: torch.Tensor) -> torch.Tensor:
        slots_N = slots_TK.flatten()
        every_S = torch.arange(self.num_slots, device=slots_TK.device)
        is_in_NS = slots_N[:, None] == every_S
        place_N = (is_in_NS.cumsum(0) * is_in_NS).sum(1) - 1
        row_N = torch.where(
            slots_N >= 0, slots_N * self.rows_of_slot + place_N, self.num_slots * self.rows_of_slot
        )
        self.row_TK = row_N.view(slots_TK.shape)
        return is_in_NS.sum(0).to(torch.int32)


class Fp8LoopbackExchange(LoopbackExchange):
    """Delivers tokens as Mooncake sends them in fp8, with one scale per `group` values. In memory,
    the scales of a slot's rows are adjacent."""

    def __init__(self, num_slots: int, rows_of_slot: int, row_size: int, *, group: int) -> None:
        super().__init__(num_slots, rows_of_slot, row_size)
        self._group = group

    def dispatch(
        self, layer: int, x_TH: torch.Tensor, slots_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values_TH, scales_TG = fp8_of(x_TH, self._group)
        counts_S = self._place(slots_TK)
        self.layers.append(layer)
        self.scales = self.pad(scales_TG).transpose(1, 2).contiguous().transpose(1, 2)
        return self.pad(values_TH), counts_S


class RoundingLoopbackExchange(LoopbackExchange):
    """Delivers tokens rounded to fp8, in their own dtype."""

    def __init__(self, num_slots: int, rows_of_slot: int, row_size: int, *, group: int) -> None:
        super().__init__(num_slots, rows_of_slot, row_size)
        self._group = group

    def dispatch(
        self, layer: int, x_TH: torch.Tensor, slots_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values_TH, scales_TG = fp8_of(x_TH, self._group)
        rounded_TH = values_TH.float() * scales_TG.repeat_interleave(self._group, dim=1)
        return super().dispatch(layer, rounded_TH.to(x_TH.dtype), slots_TK)


def fp8_of(x_TH: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values `[T, H]`, scales `[T, H / group]`)."""
    x_TGV = x_TH.float().unflatten(1, (-1, group))
    largest_TG = x_TGV.abs().amax(-1).clamp(min=1e-4)
    values_TGV = (x_TGV * (448.0 / largest_TG)[..., None]).clamp(-448.0, 448.0)
    return values_TGV.to(torch.float8_e4m3fn).flatten(1), largest_TG / 448.0
