"""What a scheduler decided for one step, and the batch that it amounts to."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpu_worker.engine.draw import Draw
from gpu_worker.engine.kv_blocks import KvBlocks
from gpu_worker.engine.projected_state import KNOWN, ProjectedState
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.step_batch import StepBatch


class Chunk(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence, as it is projected then."""

    sequence: Sequence
    num_tokens: int
    projected: ProjectedState


class ScoredRows(NamedTuple):
    """Rows whose logits tell how likely the prompt's tokens `targets` were: those from the prompt's
    token `first` on."""

    sequence: Sequence
    first: int
    targets: tuple[int, ...]
    num_top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """`draws[i]` and `sampled[i]` belong to row i of the wanted logits; the rows of `scored`
    follow them, in order. A token id of -1 - r in the batch is the one that the step before samples
    in its row r."""

    batch: StepBatch
    chunks: tuple[Chunk, ...]
    sampled: tuple[Sequence, ...]
    draws: tuple[Draw, ...]
    scored: tuple[ScoredRows, ...]
    grown: tuple[Sequence, ...]  # got one more block for this step
    admitted: tuple[Sequence, ...]  # in order of priority


def build_plan(
    chunks: Items[Chunk], kv: KvBlocks, *, grown: Items[Sequence], admitted: Items[Sequence]
) -> StepPlan:
    token_ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    sampled: list[Sequence] = []
    scored: list[ScoredRows] = []
    scored_rows: list[int] = []
    draws: list[Draw] = []
    for sequence, num_tokens, projected in chunks:
        begin = projected.num_computed
        end = begin + num_tokens
        if sequence.wants_prompt_logits and (rows := _scored_rows(sequence, begin, end)):
            scored.append(rows)
            row = len(token_ids) + rows.first - 1 - begin
            scored_rows += range(row, row + len(rows.targets))
        token_ids += sequence.tokens[begin:end]
        positions += range(begin, end)
        if end == projected.num_tokens and projected.row != KNOWN:
            token_ids.append(-1 - projected.row)
        if end == projected.num_tokens and sequence.samples:
            wanted.append(len(token_ids) - 1)
            sampled.append(sequence)
            draws.append(_draw(sequence, projected.num_tokens))
    index_S = np.arange(len(chunks), dtype=np.int32)
    batch = StepBatch(
        token_ids_T=np.array(token_ids, dtype=np.int32),
        position_T=np.array(positions, dtype=np.int32),
        sequence_T=np.repeat(index_S, [chunk.num_tokens for chunk in chunks]),
        block_tables_SB=kv.tables([chunk.sequence.row for chunk in chunks]),
        logits_rows_R=np.array(wanted + scored_rows, dtype=np.int32),
    )
    return StepPlan(
        batch=batch,
        chunks=tuple(chunks),
        sampled=tuple(sampled),
        draws=tuple(draws),
        scored=tuple(scored),
        grown=tuple(grown),
        admitted=tuple(admitted),
    )


def _draw(sequence: Sequence, num_tokens: int) -> Draw:
    return Draw(
        sequence.sampling,
        num_tokens,
        sequence.banned_ids_at(num_tokens),
        sequence.token_counts,
        None if sequence.matcher is None else sequence.matcher.allowed,
    )


def _scored_rows(sequence: Sequence, begin: int, end: int) -> ScoredRows | None:
    """Those of positions begin … end-1 that tell of a prompt's token that is not scored yet: the
    row of position p tells of token p + 1."""
    begin = max(begin, sequence.num_scored)
    end = min(end, sequence.num_prompt - 1)
    if begin >= end:
        return None
    targets = tuple(sequence.tokens[begin + 1 : end + 1])
    return ScoredRows(sequence, begin + 1, targets, sequence.sampling.prompt_logprobs or 0)
