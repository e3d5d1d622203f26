"""A deterministic model whose next token is a hash of the whole prefix, read back through the paged
cache: a wrong position, block, chunk or replay changes every later token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.draw import Draw
from gpu_worker.engine.kv_replication import KvReplicator
from gpu_worker.engine.sampler import sample
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.scheduler_limits import SchedulerLimits
from gpu_worker.engine.sequence import Origin
from gpu_worker.engine.step_batch import Forward, StepBatch
from gpu_worker.engine.token_limits import token_limits
from gpu_worker.exchange.interface import Exchange
from shared.types import Attempt, FinishReason, SamplingParams, SessionId
from shared.wire import Submit

VOCAB = 23
EOS = 0
HIDDEN = 2


def limits(**changes: int) -> SchedulerLimits:
    given = {
        "vocab_size": VOCAB,
        "context_tokens_max": 64,
        "kv_blocks": 32,
        "kv_block_tokens": 4,
        "step_tokens_max": 16,
        "prefill_chunk_tokens": 8,
        "running_max": 4,
        "waiting_max": 8,
    }
    return SchedulerLimits(**{**given, **changes})


def scheduler(replicator: KvReplicator | None = None, **changes: int) -> Scheduler:
    return Scheduler(limits(**changes), (EOS,), replicator=replicator)


def submit(
    session: str = "s",
    tokens: tuple[int, ...] = (3, 4, 5),
    *,
    attempt: int = 0,
    num_emitted: int = 0,
    **sampling: object,
) -> Submit:
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    return Submit(
        session=SessionId(session),
        attempt=Attempt(attempt),
        tokens=tokens,
        num_emitted=num_emitted,
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
    )


def origin(number: int = 1) -> Origin:
    return Origin(number)


def logits_after(prefix: list[int]) -> NDArray[np.float32]:
    state = 17
    for token in prefix:
        state = (state * 1103515245 + token * 12345 + 7) % (1 << 31)
    values = [(state * (i + 3) * 2654435761 >> 7) % 1009 / 250 for i in range(VOCAB)]
    return np.array(values, dtype=np.float32)


def alone(
    prompt: tuple[int, ...], sampling: SamplingParams, tokens_max: int = 64
) -> tuple[list[int], FinishReason]:
    """The undisturbed run: computes the whole prefix again for each token."""
    tokens = list(prompt)
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))}
    while True:
        num_made = len(tokens) - len(prompt)
        banned = tuple(stops) if num_made < sampling.min_tokens else ()
        row = logits_after(tokens)[None]
        own = token_limits(sampling, tokens[len(prompt) :])
        if own is not None:
            banned = (*banned, *own.banned())
        allowed = None if own is None else own.allowed(None)
        (token,) = sample(row, [Draw(sampling, len(tokens), banned, allowed=allowed)])
        tokens.append(token)
        if token in stops:
            return tokens[len(prompt) :], FinishReason.STOP
        if num_made + 1 >= sampling.max_tokens or len(tokens) >= tokens_max:
            return tokens[len(prompt) :], FinishReason.LENGTH


class ToyModel:
    """Its KV is the token itself. Cells are poisoned at first, so reading one too early shows."""

    num_moe_layers = 1
    vocab_size = VOCAB

    def __init__(self, kv_blocks: int = 32, block_tokens: int = 4) -> None:
        self.cache = np.full((kv_blocks, block_tokens), -1, dtype=np.int64)
        self.block_tokens = block_tokens

    def write(self, batch: StepBatch) -> None:
        for t in range(batch.num_tokens):
            self.cache[self._cell(batch, t, int(batch.position_T[t]))] = batch.token_ids_T[t]

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        rows = [logits_after(self._prefix(batch, t)) for t in batch.logits_rows_R.tolist()]
        return np.array(rows, dtype=np.float32).reshape(len(rows), VOCAB)

    def forward(self, batch: StepBatch, exchange: Exchange) -> Forward:
        self.write(batch)
        x_TH = np.zeros((batch.num_tokens, HIDDEN), dtype=np.float32)
        dispatched = exchange.dispatch(0, x_TH, np.zeros((batch.num_tokens, 1), dtype=np.int32))
        exchange.combine(0, np.zeros((len(dispatched.rows_N), HIDDEN), dtype=np.float32))
        return Forward(
            logits_RV=self.logits(batch),
            any_work=dispatched.any_work,
            any_tokens=dispatched.any_tokens,
            all_know_next=dispatched.all_know_next,
        )

    def draft(
        self,
        batch: StepBatch,
        next_ids_T: NDArray[np.int32],
        rows_R: NDArray[np.int32],
        exchange: Exchange,
    ) -> NDArray[np.float32]:
        """Implements `DraftModel`. Two guesses of three are right."""
        x_TH = np.zeros((batch.num_tokens, HIDDEN), dtype=np.float32)
        sent = exchange.dispatch(1, x_TH, np.zeros((batch.num_tokens, 1), dtype=np.int32))
        exchange.combine(1, np.zeros((len(sent.rows_N), HIDDEN), dtype=np.float32))
        rows = []
        for t in rows_R.tolist():
            prefix = [*self._prefix(batch, t), int(next_ids_T[t])]
            rows.append(np.roll(logits_after(prefix), 1 if sum(prefix) % 3 == 0 else 0))
        return np.array(rows, dtype=np.float32).reshape(len(rows), VOCAB)

    def _prefix(self, batch: StepBatch, t: int) -> list[int]:
        positions = range(int(batch.position_T[t]) + 1)
        prefix = [int(self.cache[self._cell(batch, t, p)]) for p in positions]
        assert -1 not in prefix, "a position was attended to before it was computed"
        return prefix

    def _cell(self, batch: StepBatch, t: int, position: int) -> tuple[int, int]:
        block = int(batch.block_tables_SB[batch.sequence_T[t], position // self.block_tokens])
        assert block >= 0, "a token lies outside of its block table"
        return block, position % self.block_tokens
