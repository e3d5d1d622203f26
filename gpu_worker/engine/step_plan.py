"""What a scheduler decided for one step, and the batch that it amounts to."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpu_worker.engine.kv_blocks import KvBlocks
from gpu_worker.engine.sampler import Draw
from gpu_worker.engine.sequence import Sequence
from gpu_worker.step_batch import StepBatch


class Chunk(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """`draws[i]` and `sampled[i]` belong to row i of the wanted logits."""

    batch: StepBatch
    chunks: tuple[Chunk, ...]
    sampled: tuple[Sequence, ...]
    draws: tuple[Draw, ...]
    grown: tuple[Sequence, ...]  # got one more block for this step
    admitted: tuple[Sequence, ...]  # in order of priority


def build_plan(
    chunks: Items[Chunk], kv: KvBlocks, *, grown: Items[Sequence], admitted: Items[Sequence]
) -> StepPlan:
    token_ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    sampled: list[Sequence] = []
    for sequence, num_tokens in chunks:
        begin = sequence.num_computed
        end = begin + num_tokens
        token_ids += sequence.tokens[begin:end]
        positions += range(begin, end)
        if end == len(sequence.tokens):
            wanted.append(len(token_ids) - 1)
            sampled.append(sequence)
    index_S = np.arange(len(chunks), dtype=np.int32)
    batch = StepBatch(
        token_ids_T=np.array(token_ids, dtype=np.int32),
        position_T=np.array(positions, dtype=np.int32),
        sequence_T=np.repeat(index_S, [chunk.num_tokens for chunk in chunks]),
        block_tables_SB=kv.tables([chunk.sequence.row for chunk in chunks]),
        logits_rows_R=np.array(wanted, dtype=np.int32),
    )
    return StepPlan(
        batch=batch,
        chunks=tuple(chunks),
        sampled=tuple(sampled),
        draws=tuple(Draw(s.sampling, len(s.tokens), s.banned_ids) for s in sampled),
        grown=tuple(grown),
        admitted=tuple(admitted),
    )
