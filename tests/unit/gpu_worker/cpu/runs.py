"""Drives a model through steps the way an engine does, over the in-process exchange."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpu_worker.cpu.decoder import Decoder
from gpu_worker.cpu.registry import load_model
from gpu_worker.engine.step_batch import Forward, StepBatch
from shared.clock import SystemClock
from shared.expert_map import ExpertMap
from shared.model_spec import ModelSpec, read_model_spec, with_drafts
from shared.types import ABSENT_SLOT, Epoch, Incarnation, Member, RankId, Step, SuspicionReason
from tests.support.local_exchange import LocalExchange, LocalHub

SMALL = {
    "vocab_size": 300,
    "num_hidden_layers": 3,
    "hidden_size": 36,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "intermediate_size": 22,
    "max_position_embeddings": 128,
}
"""Sizes that no vector width divides."""

EPOCH = Epoch(1)


class QuietMonitor:
    epoch = EPOCH

    def newest_epoch(self) -> Epoch:
        return self.epoch

    def beat(self, waiting_for: Sequence[RankId]) -> None:
        pass

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        pass


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence from position `start` on, and its block table."""

    tokens: Sequence[int]
    start: int
    table: Sequence[int]


def make_batch(chunks: Sequence[Chunk], *, all_rows: bool = True) -> StepBatch:
    """Wants the logits of all rows, or of every chunk's last."""
    lengths = [len(chunk.tokens) for chunk in chunks]
    width = max((len(chunk.table) for chunk in chunks), default=1)
    tables = np.full((len(chunks), width), -1, dtype=np.int32)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.table)] = chunk.table
    positions = [np.arange(c.start, c.start + len(c.tokens)) for c in chunks]
    ends = np.cumsum(lengths, dtype=np.int32)
    return StepBatch(
        token_ids_T=np.array([t for c in chunks for t in c.tokens], dtype=np.int32),
        position_T=np.concatenate([*positions, []]).astype(np.int32),
        sequence_T=np.repeat(np.arange(len(chunks), dtype=np.int32), lengths),
        block_tables_SB=tables,
        logits_rows_R=np.arange(sum(lengths), dtype=np.int32)
        if all_rows
        else (ends - 1).astype(np.int32),
    )


@dataclass
class RankRun:
    """A model with its end of an exchange."""

    model: Decoder
    exchange: LocalExchange
    expert_map: ExpertMap
    monitor: QuietMonitor
    member: Member
    steps: int = field(default=0)

    def step(self, batch: StepBatch) -> Forward:
        num_tokens = batch.num_tokens
        self.exchange.begin_step(
            self.expert_map.epoch, Step(self.steps), num_tokens=num_tokens, has_work=num_tokens > 0
        )
        self.steps += 1
        return self.model.forward(batch, self.exchange)

    def logits(self, *chunks: Chunk) -> NDArray[np.float32]:
        return self.step(make_batch(chunks)).logits_RV

    def greedy(self, prompt: Sequence[int], table: Sequence[int], count: int) -> list[int]:
        """`count` tokens, one step each; the last one's KV is not written."""
        known = list(prompt)
        chunk = Chunk(tokens=prompt, start=0, table=table)
        for _ in range(count):
            logits_RV = self.step(make_batch([chunk], all_rows=False)).logits_RV
            known.append(int(logits_RV[0].argmax()))
            chunk = Chunk(tokens=known[-1:], start=len(known) - 1, table=table)
        return known[len(prompt) :]


def open_ranks(
    folder: Path,
    num_ranks: int,
    *,
    kv_blocks: int = 64,
    block_tokens: int = 4,
    speculative_tokens: int = 0,
) -> list[RankRun]:
    """`num_ranks` ranks that share the experts, with one redundant slot each."""
    spec = with_drafts(read_model_spec(folder), speculative_tokens)
    expert_map = spread_map(spec, num_ranks)
    hub = LocalHub(num_ranks, spec.hidden_size, spec.top_k)
    runs = []
    for member in expert_map.members:
        model = load_model(
            folder,
            slots_per_rank=expert_map.slots_per_rank,
            kv_blocks=kv_blocks,
            block_tokens=block_tokens,
            speculative_tokens=speculative_tokens,
        )
        model.slots.load_all(expert_map.placement[:, member.rank])
        monitor = QuietMonitor()
        exchange = hub.exchange(member, monitor, SystemClock(), 1e9)
        exchange.adopt(expert_map)
        runs.append(RankRun(model, exchange, expert_map, monitor, member))
    return runs


def adopt_without(runs: Sequence[RankRun], dead: int) -> list[RankRun]:
    """The survivors, under a map of the next epoch that leaves the dead rank out: they have loaded
    what it alone held."""
    survivors = [run for run in runs if run.member.rank != dead]
    spec, old = runs[0].model.spec, runs[0].expert_map
    dense = spread_map(spec, len(survivors), old.slots_per_rank).placement
    placement = np.full(old.placement.shape, ABSENT_SLOT, dtype=np.int16)
    for index, run in enumerate(survivors):
        placement[:, run.member.rank] = dense[:, index]
    new = ExpertMap(
        epoch=Epoch(old.epoch + 1),
        num_experts=spec.num_experts,
        members=tuple(run.member for run in survivors),
        placement=placement,
    )
    for run in survivors:
        run.model.slots.load_all(new.placement[:, run.member.rank])
        run.monitor.epoch, run.expert_map, run.steps = new.epoch, new, 0
        run.exchange.adopt(new)
    return survivors


def spread_map(spec: ModelSpec, num_ranks: int, slots: int | None = None) -> ExpertMap:
    """Experts in turn over the ranks, rotated by layer; what is left of the slots holds second
    replicas. Room for `num_ranks - 1` to hold every expert."""
    if slots is None:
        slots = -(-spec.num_experts // max(num_ranks - 1, 1)) + 1
    order = np.arange(num_ranks * slots) % max(spec.num_experts, 1)
    rows = [np.roll(order, 3 * layer) for layer in range(spec.num_moe_layers)]
    placement = np.array(rows, dtype=np.int16).reshape(spec.num_moe_layers, num_ranks, slots)
    members = tuple(
        Member(rank=RankId(rank), incarnation=Incarnation(1)) for rank in range(num_ranks)
    )
    return ExpertMap(
        epoch=EPOCH, num_experts=spec.num_experts, members=members, placement=placement
    )


def step_together(runs: Sequence[RankRun], batches: Sequence[StepBatch]) -> list[Forward]:
    """One lockstep step of all ranks, a thread each."""
    with ThreadPoolExecutor(len(runs)) as pool:
        futures = [pool.submit(run.step, b) for run, b in zip(runs, batches, strict=True)]
        return [future.result(timeout=60) for future in futures]
