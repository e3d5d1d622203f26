"""Looks into a scheduler's KV blocks and holds them to what must be true of them at any moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

from gpu_worker.engine.block_names import extend_names
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.scheduler_limits import SchedulerLimits
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.step_plan import StepPlan
from shared.types import SessionId
from tests.unit.gpu_worker.engine.toy import ToyModel


@dataclass(frozen=True)
class BlockSnapshot:
    """Which blocks each running sequence has, and what is cached."""

    tables: dict[SessionId, tuple[list[int], int]]
    num_free: int
    names: dict[int, bytes]
    num_restored: int


class KvAudit:
    def __init__(self, engine: Scheduler, model: ToyModel, limits: SchedulerLimits) -> None:
        self._engine = engine
        self._kv = engine._kv
        self._model = model
        self._limits = limits
        self._contents: dict[bytes, list[int]] = {}  # of every name ever seen

    def check(self) -> None:
        users = Counter(block for s in self._engine._running for block in self._table(s))
        assert self._kv._num_users == [users[block] for block in range(self._kv.num_blocks)]
        index = self._kv._index
        free, idle = self._kv._free, list(index._idle)
        assert sorted([*free, *idle, *users]) == list(range(self._kv.num_blocks))
        assert not any(index.name_of(block) for block in free)
        assert {index.block_of(name) for name in index._block_of} == set(index._name_of)
        if not self._limits.prefix_cache:
            assert not index.num_named
        for sequence in self._engine._running:
            self._check_row(sequence)
        for block, name in index._name_of.items():
            assert self._model.cache[block].tolist() == self._contents[name]

    def check_plan(self, plan: StepPlan) -> None:
        """Nobody but its writer has a block that is written, and it has no name."""
        batch = plan.batch
        for row, position in zip(batch.sequence_T, batch.position_T, strict=True):
            block = int(batch.block_tables_SB[row, position // self._limits.kv_block_tokens])
            assert self._kv._num_users[block] == 1
            assert self._kv.name_of(block) is None

    def note_commit(self, plan: StepPlan) -> None:
        """It comes next, and may publish blocks."""
        for chunk in plan.chunks:
            self._learn([*chunk.sequence.tokens, *chunk.drafts])

    def note_submit(self, tokens: Items[int]) -> None:
        """Blocks of these may be restored."""
        self._learn(list(tokens))

    def check_content(self, name: bytes, content: Items[int]) -> None:
        """Of a copy of a block of this rank."""
        assert list(content) == self._contents[name]

    def take_snapshot(self) -> BlockSnapshot:
        return BlockSnapshot(
            tables={s.session: (self._table(s), s.num_computed) for s in self._engine._running},
            num_free=self._kv.num_free,
            names=dict(self._kv._index._name_of),
            num_restored=self._engine.num_restored,
        )

    def check_restored(self, before: BlockSnapshot) -> None:
        """After an abandoned step: who still runs has what it had; nothing new is cached but what
        was restored."""
        self.check()
        after = self.take_snapshot()
        assert after.tables.items() <= before.tables.items()
        if after.tables == before.tables:
            assert after.num_free == before.num_free
        num_new = len(after.names.items() - before.names.items())
        assert num_new <= after.num_restored - before.num_restored

    def _learn(self, tokens: list[int]) -> list[bytes]:
        size = self._limits.kv_block_tokens
        names: list[bytes] = []
        extend_names(names, tokens, size)
        for column, name in enumerate(names):
            self._contents[name] = tokens[column * size : (column + 1) * size]
        return names

    def _check_row(self, sequence: Sequence) -> None:
        size = self._limits.kv_block_tokens
        names = self._learn(sequence.tokens)
        assert sequence.num_published * size <= sequence.num_computed < len(sequence.tokens)
        for column, block in enumerate(self._table(sequence)):
            if column >= sequence.num_published:
                assert self._kv.name_of(block) is None
                assert self._kv._num_users[block] == 1
                continue
            assert self._kv.name_of(block) == names[column]

    def _table(self, sequence: Sequence) -> list[int]:
        length = self._kv._lengths[sequence.row]
        blocks: list[int] = self._kv._tables[sequence.row, :length].tolist()
        return blocks
