"""What the scheduler decided for one step, the batch to compute for it, and what it leaves for the
step after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from gpu_worker.engine.draw import Draw
from gpu_worker.engine.kv_blocks import KvBlocks
from gpu_worker.engine.projected_state import KNOWN, ProjectedState, current_state
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.step_batch import StepBatch

NO_DRAFT = -1
NO_DRAFTS: Mapping[int, int] = MappingProxyType({})


class Chunk(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence, whose state is `projected` then. The
    last of them may be `drafts`, which follow all known tokens."""

    sequence: Sequence
    num_tokens: int
    projected: ProjectedState
    drafts: tuple[int, ...] = ()


class ScoredRows(NamedTuple):
    """Rows whose logits give the probabilities of the prompt's tokens `targets`; `first` is the
    index of the first of them in the prompt."""

    sequence: Sequence
    first: int
    targets: tuple[int, ...]
    num_top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """`draws[i]` and `sampled[i]` belong to row i of the wanted logits. The rows of `scored` follow
    them, in order. A token id of -1 - r in the batch stands for the token that the step before
    samples in its row r. `follows[i]` is the draft whose row i is, if it is one's: it counts only
    if row i - 1 does and gives that token (`drafting`); else NO_DRAFT."""

    batch: StepBatch
    chunks: tuple[Chunk, ...]
    sampled: tuple[Sequence, ...]
    draws: tuple[Draw, ...]
    follows: tuple[int, ...]
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
    follows: list[int] = []
    for sequence, num_tokens, projected, drafts in chunks:
        begin = projected.num_computed
        end = begin + num_tokens - len(drafts)
        if sequence.wants_prompt_logits and (rows := _scored_rows(sequence, begin, end)):
            scored.append(rows)
            row = len(token_ids) + rows.first - 1 - begin
            scored_rows += range(row, row + len(rows.targets))
        token_ids += sequence.tokens[begin:end]
        positions += range(begin, begin + num_tokens)
        if end == projected.num_tokens and projected.row != KNOWN:
            token_ids.append(-1 - projected.row)
        if end == projected.num_tokens and sequence.samples:
            for ahead, draft in enumerate((NO_DRAFT, *drafts)):
                if draft != NO_DRAFT:
                    token_ids.append(draft)
                wanted.append(len(token_ids) - 1)
                sampled.append(sequence)
                draws.append(_draw(sequence, end + ahead))
                follows.append(draft)
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
        follows=tuple(follows),
        scored=tuple(scored),
        grown=tuple(grown),
        admitted=tuple(admitted),
    )


def projected_after(
    before: StepPlan, running: Iterable[Sequence]
) -> dict[Sequence, ProjectedState]:
    """The state of each running sequence after the step `before`, without those that this step
    ends whatever it samples. An end token may still end others."""
    chunks = {chunk.sequence: chunk for chunk in before.chunks}
    rows = {sequence: row for row, sequence in enumerate(before.sampled)}
    result: dict[Sequence, ProjectedState] = {}
    for sequence in running:
        if (chunk := chunks.get(sequence)) is None:
            result[sequence] = current_state(sequence)
            continue
        num_tokens = chunk.projected.num_tokens
        num_computed = chunk.projected.num_computed + chunk.num_tokens
        if (row := rows.get(sequence)) is None:
            result[sequence] = ProjectedState(num_tokens, num_computed)
        elif not sequence.is_full_at(num_tokens + 1):
            result[sequence] = ProjectedState(num_tokens + 1, num_computed, row)
    return result


def depends_on_tokens(before: StepPlan) -> bool:
    """Whether the step after this one can be planned only once this one's tokens are known."""
    has_drafts = any(draft != NO_DRAFT for draft in before.follows)
    return has_drafts or bool(before.scored) or any(s.depends_on_tokens for s in before.sampled)


def _draw(sequence: Sequence, num_tokens: int) -> Draw:
    state = sequence.draw_state
    return Draw(
        sequence.sampling,
        num_tokens,
        sequence.banned_ids_at(num_tokens),
        state.counts,
        sequence.allowed,
        state.bias,
    )


def _scored_rows(sequence: Sequence, begin: int, end: int) -> ScoredRows | None:
    """The rows of positions begin … end-1 that score a prompt's token which is not scored yet. The
    row of position p scores token p + 1."""
    begin = max(begin, sequence.num_scored)
    end = min(end, sequence.num_prompt - 1)
    if begin >= end:
        return None
    targets = tuple(sequence.tokens[begin + 1 : end + 1])
    return ScoredRows(sequence, begin + 1, targets, sequence.sampling.prompt_logprobs or 0)
