"""Log-probabilities of given tokens from a model in one process. Experts can be left out, to
measure what a system would answer that masks a dead rank's experts and continues."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpu_worker.cpu.decoder import Decoder
from gpu_worker.cpu.family import Floats
from gpu_worker.cpu.registry import load_model
from gpu_worker.engine.step_batch import StepBatch
from gpu_worker.exchange.interface import Dispatched
from gpu_worker.exchange.single_rank import SingleRankExchange
from shared.model_spec import read_model_spec
from shared.types import Epoch, Step

_BLOCK_TOKENS = 16
_CHUNK_TOKENS = 128
EPOCH = Epoch(1)


class _ExpertDroppingExchange:
    """An exchange in which some experts never answer. Their terms are missing from the sum, as if a
    combine skipped a dead rank."""

    def __init__(self, inner: SingleRankExchange, missing: Collection[int]) -> None:
        self._inner = inner
        self._missing = np.array(sorted(missing), dtype=np.int32)
        self._dropped_TK: NDArray[np.bool_] = np.zeros((0, 0), dtype=np.bool_)
        self.adopt, self.begin_step = inner.adopt, inner.begin_step

    @property
    def may_change_map(self) -> bool:
        return self._inner.may_change_map

    def dispatch(self, layer: int, x_TH: Floats, experts_TK: NDArray[np.int32]) -> Dispatched:
        self._dropped_TK = np.isin(experts_TK, self._missing)
        return self._inner.dispatch(layer, x_TH, experts_TK)

    def combine(self, layer: int, y_NH: Floats) -> Floats:
        y_TKH = self._inner.combine(layer, y_NH).copy()
        y_TKH[self._dropped_TK] = 0.0
        return y_TKH


class LocalScorer:
    """One rank that holds every expert. Raises CheckpointError."""

    def __init__(self, folder: Path, *, missing: Collection[int] = ()) -> None:
        spec = read_model_spec(folder)
        self._model = load_model(
            folder,
            slots_per_rank=spec.num_experts,
            kv_blocks=-(-spec.context_tokens_max // _BLOCK_TOKENS),
            block_tokens=_BLOCK_TOKENS,
        )
        self._exchange = _ExpertDroppingExchange(load_all_experts(self._model), missing)
        self._steps = 0

    def nats(self, tokens: Sequence[int]) -> float:
        """The exact sum of the negative log-probabilities of all tokens except the first. Each is a
        log-softmax in float64, as in the server."""
        parts: list[float] = []
        for first in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[first : first + _CHUNK_TOKENS]
            for row, logits_V in enumerate(self._logits(chunk, first)):
                position = first + row + 1
                if position < len(tokens):
                    x_V = logits_V.astype(np.float64)
                    x_V -= x_V.max()
                    parts.append(math.log(np.exp(x_V).sum()) - float(x_V[tokens[position]]))
        return math.fsum(parts)

    def _logits(self, chunk: Sequence[int], first: int) -> Floats:
        count = len(chunk)
        blocks = -(-(first + count) // _BLOCK_TOKENS)
        batch = StepBatch(
            token_ids_T=np.array(chunk, dtype=np.int32),
            position_T=np.arange(first, first + count, dtype=np.int32),
            sequence_T=np.zeros(count, dtype=np.int32),
            block_tables_SB=np.arange(blocks, dtype=np.int32)[None],
            logits_rows_R=np.arange(count, dtype=np.int32),
        )
        self._exchange.begin_step(EPOCH, Step(self._steps), num_tokens=count, has_work=True)
        self._steps += 1
        return self._model.forward(batch, self._exchange).logits_RV


def experts_of_rank(rank: int, num_ranks: int, num_experts: int) -> range:
    """The experts of a rank if each expert has one replica and ranks hold contiguous shares."""
    return range(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks)


def load_all_experts(model: Decoder) -> SingleRankExchange:
    """Loads every expert into the model's slots, for a rank without peers."""
    experts_E = np.arange(model.spec.num_experts, dtype=np.int16)
    model.slots.load_all(np.tile(experts_E, (model.spec.num_moe_layers, 1)))
    return SingleRankExchange()
