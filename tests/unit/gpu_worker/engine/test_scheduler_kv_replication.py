"""What a sequence takes from replicas, and when its blocks are offered. Blocks have 4
tokens, chunks 8."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gpu_worker.engine.block_names import extend_names
from gpu_worker.engine.scheduler import Committed, Scheduler
from shared.types import Attempt, Member, RankId, SessionId
from shared.wire import SessionTokens
from tests.unit.gpu_worker.engine.toy import origin, scheduler, submit

LONG = tuple(range(1, 21))


def names_of(tokens: Sequence[int]) -> list[bytes]:
    names: list[bytes] = []
    extend_names(names, tokens, 4)
    return names


class FakeReplicator:
    """Has the blocks of `kept`, and remembers what it is offered."""

    def __init__(self) -> None:
        self.kept: set[bytes] = set()
        self.filled: dict[int, bytes] = {}
        self.offered: dict[SessionId, list[tuple[bytes, int]]] = {}
        self.backups: dict[SessionId, RankId] = {}

    def keep(self, tokens: Sequence[int], *columns: int) -> None:
        """All blocks of these, or those of some columns."""
        names = names_of(tokens)
        self.kept |= {names[column] for column in columns or range(len(names))}

    def use(self, others: Sequence[Member]) -> None:
        pass

    def restore(self, names: Sequence[bytes], blocks: Sequence[int]) -> int:
        num_kept = next((i for i, n in enumerate(names) if n not in self.kept), len(names))
        self.filled.update(zip(blocks[:num_kept], names[:num_kept], strict=True))
        return num_kept

    def offer(self, session: SessionId, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        self.offered.setdefault(session, []).extend(zip(names, blocks, strict=True))

    def forget(self, session: SessionId) -> None:
        self.offered.pop(session, None)

    def backup_of(self, session: SessionId) -> RankId | None:
        return self.backups.get(session)

    num_rejected = 0

    def send_offered(self) -> bool:
        return False

    def names_offered(self, session: str) -> list[bytes]:
        return [name for name, _ in self.offered.get(SessionId(session), [])]


@pytest.fixture
def replicator() -> FakeReplicator:
    return FakeReplicator()


def run_step(engine: Scheduler, token: int = 5) -> Committed:
    plan = engine.plan()
    return engine.commit(plan, [token] * len(plan.sampled))


def replies(committed: Committed) -> list[SessionTokens]:
    return [reply for batch in committed.replies.values() for reply in batch]


def planned(engine: Scheduler) -> list[tuple[str, list[int]]]:
    """The positions that the next step would compute; leaves no trace but what is restored."""
    plan = engine.plan()
    positions = [plan.batch.position_T[plan.batch.sequence_T == i] for i in range(len(plan.chunks))]
    result = [
        (str(c.sequence.session), p.tolist()) for c, p in zip(plan.chunks, positions, strict=True)
    ]
    engine.abandon(plan)
    return result


# what is restored


def test_a_moved_session_computes_what_its_copies_lack(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    replicator.keep(LONG)
    engine.submit(origin(), submit("s", LONG, num_emitted=3))
    plan = engine.plan()
    assert plan.batch.position_T.tolist() == [16, 17, 18, 19]
    table = plan.batch.block_tables_SB[0].tolist()
    assert [replicator.filled.get(block) for block in table] == [*names_of(LONG)[:4], None]
    committed = engine.commit(plan, [5])
    assert committed.num_reprefilled == 4
    assert replies(committed)[0].cached_tokens == 16
    assert engine.num_restored == 4


@pytest.mark.parametrize(
    ("columns", "first"), [((0, 2, 3), 4), ((1, 2, 3), 0), ((0, 1), 8), ((3,), 0)]
)
def test_behind_a_hole_no_copy_is_used(
    replicator: FakeReplicator, columns: tuple[int, ...], first: int
) -> None:
    engine = scheduler(replicator)
    replicator.keep(LONG, *columns)
    engine.submit(origin(), submit("s", LONG, num_emitted=3))
    ((_, positions),) = planned(engine)
    assert positions[0] == first
    assert engine.num_restored == first // 4


def test_copies_go_on_where_the_cache_ends(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("warm", LONG[:9], max_tokens=1))
    run_step(engine)
    run_step(engine)
    replicator.keep(LONG)
    engine.submit(origin(), submit("s", LONG))
    assert planned(engine) == [("s", [16, 17, 18, 19])]
    assert engine.num_restored == 2
    assert engine.load().kv_blocks_cached == 4


def test_what_was_restored_for_an_abandoned_step_is_cached_and_taken_once(
    replicator: FakeReplicator,
) -> None:
    engine = scheduler(replicator)
    replicator.keep(LONG)
    engine.submit(origin(), submit("s", LONG))
    free = engine.load().kv_blocks_free
    assert planned(engine) == planned(engine) == [("s", [16, 17, 18, 19])]
    assert engine.num_restored == 4
    assert (engine.load().kv_blocks_free, engine.load().kv_blocks_cached) == (free, 4)
    replicator.kept.clear()
    engine.cancel(SessionId("s"), Attempt(0))
    engine.submit(origin(), submit("t", LONG))
    assert planned(engine) == [("t", [16, 17, 18, 19])]


def test_who_is_admitted_ahead_of_tokens_begins_with_copies_too(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("before", (1, 2, 3)))
    first = engine.plan()
    replicator.keep(LONG)
    engine.submit(origin(), submit("s", LONG))
    later = engine.plan_ahead()
    assert later is not None
    assert later.batch.position_T.tolist() == [3, 16, 17, 18, 19]
    engine.abandon(later)
    engine.abandon(first)
    replicator.kept.clear()
    assert planned(engine) == [("before", [0, 1, 2]), ("s", [16, 17, 18, 19])]


def test_a_plan_that_has_restored_much_admits_nobody_more(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator, restored_blocks_enough=4)
    prompts = {name: (number, *LONG) for number, name in enumerate("abc")}
    for name, prompt in prompts.items():
        replicator.keep(prompt)
        engine.submit(origin(), submit(name, prompt))
    for names in ("a", "ab", "abc"):
        plan = engine.plan()
        assert "".join(chunk.sequence.session for chunk in plan.chunks) == names
        engine.commit(plan, [5] * len(plan.sampled))


def test_those_whose_blocks_a_plan_has_restored_already_share_them(
    replicator: FakeReplicator,
) -> None:
    engine = scheduler(replicator)
    replicator.keep(LONG)
    for name in "ab":
        engine.submit(origin(), submit(name, LONG))
    assert planned(engine) == [("a", [16, 17, 18, 19]), ("b", [16, 17, 18, 19])]
    assert engine.num_restored == 4


def test_a_restored_block_that_another_computes_meanwhile_is_one_in_the_end(
    replicator: FakeReplicator,
) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("fresh", LONG))
    run_step(engine)
    replicator.keep(LONG)
    engine.submit(origin(), submit("moved", LONG, num_emitted=1))
    while engine.load().running < 2:
        run_step(engine)
    run_step(engine)
    run_step(engine)
    load = engine.load()
    assert load.kv_blocks - load.kv_blocks_free <= 7


def test_rows_whose_logits_are_wanted_are_not_restored(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    replicator.keep(LONG)
    engine.submit(origin(), submit("s", LONG, prompt_logprobs=0))
    assert planned(engine) == [("s", [*range(8)])]


def test_without_the_prefix_cache_nothing_is_restored_nor_offered(
    replicator: FakeReplicator,
) -> None:
    engine = scheduler(replicator, prefix_cache=False)
    replicator.keep(LONG)
    engine.submit(origin(), submit("s", LONG))
    assert planned(engine) == [("s", [*range(8)])]
    for _ in range(4):
        run_step(engine)
    assert replicator.offered == {}
    assert engine.num_restored == 0


# what is offered


def test_full_blocks_are_offered_after_their_step_in_order(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("s", LONG))
    tables = []
    for num_blocks in (2, 4, 5, 5, 5, 5, 6):
        plan = engine.plan()
        tables.append(plan.batch.block_tables_SB[0].tolist())
        engine.abandon(plan)
        before = len(replicator.names_offered("s"))
        run_step(engine)
        assert replicator.names_offered("s") == names_of((*LONG, *[5] * 8))[:num_blocks]
        assert before <= num_blocks
    assert [block for _, block in replicator.offered[SessionId("s")]] == tables[-1][:6]


def test_an_abandoned_step_offers_nothing(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("s", LONG))
    engine.abandon(engine.plan())
    assert replicator.offered == {}


def test_blocks_that_were_cached_or_restored_are_offered_too(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("warm", LONG[:9], max_tokens=1))
    run_step(engine)
    run_step(engine)
    replicator.keep(LONG)
    engine.submit(origin(), submit("s", LONG))
    run_step(engine)
    assert replicator.names_offered("s") == names_of(LONG)


def test_who_ends_is_forgotten(replicator: FakeReplicator) -> None:
    engine = scheduler(replicator)
    for name, max_tokens in (("short", 1), ("long", 9), ("cancelled", 9)):
        engine.submit(origin(), submit(name, LONG[:8], max_tokens=max_tokens))
    for _ in range(3):
        run_step(engine)
    engine.cancel(SessionId("cancelled"), Attempt(0))
    assert [*replicator.offered] == ["long"]
    engine.submit(origin(), submit("long", LONG[:8], attempt=1))
    assert replicator.offered == {}


def test_who_is_preempted_is_forgotten_and_offered_from_its_first_block_on_again(
    replicator: FakeReplicator,
) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("s", LONG))
    run_step(engine)
    engine._stop_running(engine._running.pop())
    assert replicator.offered == {}
    run_step(engine)
    assert replicator.names_offered("s") == names_of(LONG)[:4]


# who has replicas


def test_a_backup_rank_is_reported_with_a_token_whenever_it_changes(
    replicator: FakeReplicator,
) -> None:
    engine = scheduler(replicator)
    engine.submit(origin(), submit("s", LONG[:3]))
    reported = []
    for backup in (None, 2, 2, None, 2, 0, 0):
        if backup is None:
            replicator.backups.clear()
        else:
            replicator.backups[SessionId("s")] = RankId(backup)
        (reply,) = replies(run_step(engine))
        reported.append(reply.backup_rank)
    assert reported == [-1, 2, -1, -1, -1, 0, -1]
