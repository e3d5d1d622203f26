"""Speculative decoding: which drafts a step verifies, which of them were right, and for what the
next step gets drafts. Pure.

Theory of operation. After a step, a model with a layer for it guesses the token that will follow
the one just drawn: the sequence's *draft*. The next step runs the draft behind the last known
token, as if it were one, and draws from both rows. If the first draw gives the draft, the second
one was made from the very logits that a step without drafts would have had, and the sequence gains
two tokens; else the second is thrown away. A draw depends on its row's logits, the request's seed
and the position alone, and a row's bits do not depend on the batch: so a draft decides how many
steps an answer takes, never what it says.

The KV of a wrong draft lies behind the sequence's computed tokens, where the next step overwrites
it before it is read; blocks are published up to these tokens alone. The draft's own layer of KV may
differ in a shared block's last token, whose entry depends on the token after it. That changes what
is guessed next.

Sequences whose next token depends on earlier ones by more than their logits (a grammar, a penalty)
have no drafts.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.draw import Draw
from gpu_worker.engine.kv_blocks import KvBlocks
from gpu_worker.engine.projected_state import KNOWN
from gpu_worker.engine.sampler import NO_TOKEN, sample
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.step_batch import DraftModel
from gpu_worker.engine.step_budget import StepBudget
from gpu_worker.engine.step_plan import NO_DRAFT, Chunk, StepPlan
from gpu_worker.exchange.interface import Exchange

SEQUENCES_MAX = 8
"""If more of a rank's sequences get tokens in a step, none gets a draft: a row more takes about as
long then as a step for it alone, so even right guesses would save nothing."""


def add_drafts(budget: StepBudget, kv: KvBlocks, *, num_running: int) -> list[Sequence]:
    """Has those that decode verify their drafts, if the step has room. Returns those that got a
    block more for it, which is always one that they need after this step in any case; so many
    others must be able to get one, too."""
    grown: list[Sequence] = []
    for index, chunk in enumerate(budget.chunks):
        sequence = chunk.sequence
        if not _can_verify(chunk):
            continue
        num_tokens = chunk.projected.num_tokens + len(sequence.drafts)
        needs_block = num_tokens > kv.capacity_tokens(sequence.row)
        if needs_block and kv.num_free <= num_running:
            continue
        if budget.add_drafts(index, sequence.drafts) and needs_block:
            kv.extend(sequence.row, 1)
            grown.append(sequence)
    return grown


def _can_verify(chunk: Chunk) -> bool:
    return bool(chunk.sequence.drafts) and chunk.projected.row == KNOWN


def counted_rows(plan: StepPlan, ids: Items[int]) -> list[bool]:
    """For each wanted row, of which `ids` are the tokens drawn: whether it gives its sequence a
    token. It does not if a draft before it was wrong, or if a draft's own row has nothing to draw
    from: then the next step finds that out in a row that counts."""
    counted: list[bool] = []
    for row, draft in enumerate(plan.follows):
        is_right = draft == NO_DRAFT or (counted[row - 1] and ids[row - 1] == draft)
        counted.append(is_right and (draft == NO_DRAFT or ids[row] != NO_TOKEN))
    return counted


def draft_step(
    model: DraftModel, exchange: Exchange, plan: StepPlan, ids: Items[int]
) -> dict[int, int]:
    """The token that may follow the one drawn in a wanted row, by that row: for the last row that
    counts of each sequence that goes on. Every rank must call it in the same steps. Raises
    StepAbandoned."""
    rows = _rows_to_draft(plan, ids)
    rows_R = plan.batch.logits_rows_R[rows].astype(np.int32)
    logits_RV = model.draft(plan.batch, _next_ids(plan, ids), rows_R, exchange)
    drafts = sample(logits_RV, [_draw_after(plan.draws[row]) for row in rows])
    return {row: d for row, d in zip(rows, drafts, strict=True) if d != NO_TOKEN}


def _draw_after(draw: Draw) -> Draw:
    """With the same random number as the draw that the draft must agree with."""
    return draw._replace(position=draw.position + 1)


def _rows_to_draft(plan: StepPlan, ids: Items[int]) -> list[int]:
    last: dict[Sequence, int] = {}
    for row, is_counted in enumerate(counted_rows(plan, ids)):
        if is_counted:
            last[plan.sampled[row]] = row
    if len(last) > SEQUENCES_MAX:
        return []
    return [
        row
        for sequence, row in last.items()
        if sequence.may_have_drafts_at(plan.draws[row].position + 1)
        and ids[row] != NO_TOKEN
        and ids[row] not in sequence.stop_ids
    ]


def _next_ids(plan: StepPlan, ids: Items[int]) -> NDArray[np.int32]:
    """`[T]`: for each row of the batch the token after it: the known one, or the one drawn. 0 if
    there is none."""
    next_T = np.zeros_like(plan.batch.token_ids_T)
    next_T[:-1] = plan.batch.token_ids_T[1:]
    row = 0
    for chunk in plan.chunks:
        row += chunk.num_tokens
        position, tokens = chunk.projected.num_computed + chunk.num_tokens, chunk.sequence.tokens
        next_T[row - 1] = tokens[position] if position < len(tokens) else 0
    next_T[plan.batch.logits_rows_R[: len(ids)]] = np.maximum(ids, 0)
    return next_T
