"""Steps of a CUDA decoder as the tests take them: sequence s owns the blocks from s times
`BLOCKS_EACH`; and an exchange of one rank that pads by slot."""

from __future__ import annotations

import numpy as np
import torch

from gpu_worker.cuda.decoder import Decoder
from gpu_worker.step_batch import StepBatch

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


class LoopbackExchange:
    """By plain indexing, with the layout of Mooncake's EP."""

    def __init__(self, num_slots: int, rows_of_slot: int) -> None:
        self.num_slots, self.rows_of_slot = num_slots, rows_of_slot
        self.layers: list[int] = []
        self.places: dict[tuple[int, int], tuple[int, int]] = {}

    def dispatch(
        self, layer: int, x_TH: torch.Tensor, slots_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_SMH = torch.full(
            (self.num_slots, self.rows_of_slot, x_TH.shape[1]),
            float("nan"),
            device=x_TH.device,
            dtype=x_TH.dtype,
        )
        counts_S = torch.zeros(self.num_slots, dtype=torch.int32, device=x_TH.device)
        self.layers.append(layer)
        self.places = {}
        for t, slots in enumerate(slots_TK.tolist()):
            for k, slot in enumerate(slots):
                if slot >= 0:
                    row = int(counts_S[slot])
                    x_SMH[slot, row] = x_TH[t]
                    self.places[t, k] = (slot, row)
                    counts_S[slot] += 1
        return x_SMH, counts_S

    def combine(
        self, layer: int, y_SMH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        y_TH = torch.zeros(slots_TK.shape[0], y_SMH.shape[2], device=y_SMH.device)
        for (t, k), (slot, row) in self.places.items():
            y_TH[t] += weights_TK[t, k] * y_SMH[slot, row].float()
        return y_TH.to(y_SMH.dtype)
