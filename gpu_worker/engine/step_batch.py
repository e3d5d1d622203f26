"""The tokens that one rank runs in one step, and the model that runs them. A model gets nothing
else from the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.interface import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """T tokens of S sequences (a decode gives one, a prefill chunk several), grouped by sequence
    and in rising position within each. The KV of token t goes to block
    `block_tables_SB[sequence_T[t], position_T[t] // block_tokens]`, offset `position_T[t] %
    block_tokens`; the token attends to positions 0 … position_T[t] of its sequence, whose earlier
    KV is in the cache already or is written in this very step.

    `logits_rows_R` are the rows t whose logits are wanted (the last token of each sequence whose
    known tokens end in this step).
    """

    token_ids_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    sequence_T: NDArray[np.int32]
    block_tables_SB: NDArray[np.int32]  # padded with -1
    logits_rows_R: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids_T.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Logits of the wanted rows. Whether any rank had work in this step, whether any had tokens,
    and whether all knew of a later map when they began it: the same on every rank."""

    logits_RV: NDArray[np.float32]
    any_work: bool
    any_tokens: bool
    all_know_next: bool = False


class Model(Protocol):
    """A decoder with its KV cache and its rank's expert slots. One step at a time, engine thread
    only."""

    @property
    def num_moe_layers(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def forward(self, batch: StepBatch, exchange: Exchange) -> Forward:
        """Runs every layer. If `Dispatched.any_tokens` is false at the first MoE layer, skips the
        rest. Raises StepAbandoned from the exchange; the KV written so far is then harmless,
        because a replay writes the same values to the same places."""
        ...


class DraftModel(Protocol):
    """A model with one more layer, which guesses the token after the one that was drawn last. The
    layer has a KV cache and expert slots as the others have."""

    def draft(
        self,
        batch: StepBatch,
        next_ids_T: NDArray[np.int32],
        rows_R: NDArray[np.int32],
        exchange: Exchange,
    ) -> NDArray[np.float32]:
        """Runs the layer over the batch of the `forward` before, in which some rank had tokens.
        `next_ids_T[t]` is the token after row t. Returns `[R, V]`: for each of the rows `rows_R`
        the logits of the token after that one. Raises StepAbandoned, as `forward`."""
        ...
