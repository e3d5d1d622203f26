"""The engine's loop, in a thread of its own, beside an exchange that the test holds in its hand."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.engine.engine import FAREWELL_S, STRANDED_S, Engine
from gpu_worker.engine.kv_replication import KvReplicator
from gpu_worker.engine.mailbox import (
    Adopted,
    Arrival,
    DropOrigin,
    EngineEvent,
    Fenced,
    Inbox,
    NewMap,
    SendWake,
    StepTokens,
    Stop,
    Stranded,
    Suspect,
    ThreadWaiter,
)
from gpu_worker.engine.monitor import STEP_PATIENCE_S, EngineMonitor
from gpu_worker.engine.sequence import Origin
from gpu_worker.engine.step_runner import ModelRunner
from gpu_worker.exchange.interface import Dispatched
from gpu_worker.kv_replication.writer import ReplicaWriter
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import (
    Attempt,
    Epoch,
    FinishReason,
    Incarnation,
    Member,
    RankId,
    SessionId,
    Step,
    SuspicionReason,
)
from shared.wire import Cancel, SessionTokens, Submit, Wake
from tests.unit.gpu_worker.engine.toy import (
    HIDDEN,
    ToyModel,
    alone,
    origin,
    scheduler,
    submit,
)
from tests.unit.gpu_worker.kv_replication.fakes import ArrayCache, Channel, Endpoint

ME = Member(rank=RankId(0), incarnation=Incarnation(1))
PEER = Member(rank=RankId(1), incarnation=Incarnation(1))
PATIENCE_S = 20


def stay_until(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE_S)


class HandClock:
    """Goes only as far as the test winds it."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return self.time


class OneRankExchange:
    """Gives every token back to its sender. `on_dispatch` does what the peers would do."""

    def __init__(self, monitor: EngineMonitor) -> None:
        self.monitor = monitor
        self.adopted: list[Epoch] = []
        self.begun: list[tuple[Epoch, Step, int, bool]] = []
        self.peers_have_work = False
        self.peers_know_next = False
        self.knew_next: list[bool] = []  # of each step that was begun
        self.may_change_map = True
        self.on_dispatch: Callable[[], None] = lambda: None

    def adopt(self, expert_map: ExpertMap) -> None:
        assert expert_map.has(ME)
        self.adopted.append(expert_map.epoch)

    def begin_step(
        self, epoch: Epoch, step: Step, *, num_tokens: int, has_work: bool, knows_next: bool = False
    ) -> None:
        self.begun.append((epoch, step, num_tokens, has_work))
        self.knew_next.append(knows_next)

    def dispatch(
        self, layer: int, x_TH: NDArray[np.float32], experts_TK: NDArray[np.int32]
    ) -> Dispatched:
        self.on_dispatch()
        epoch, _, num_tokens, has_work = self.begun[-1]
        if self.monitor.newest_epoch() > epoch:
            raise StepAbandoned("a newer map is here")
        rows_N = np.arange(num_tokens, dtype=np.int32)
        return Dispatched(
            x_TH,
            rows_N,
            np.zeros_like(rows_N),
            num_tokens > 0 or self.peers_have_work,
            has_work or self.peers_have_work,
            self.knew_next[-1] and self.peers_know_next,
        )

    def combine(self, layer: int, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        return y_NH.reshape(-1, 1, HIDDEN)


class Rank:
    """An engine in its thread, and the event loop's end of it."""

    def __init__(self, replicator: KvReplicator | None = None) -> None:
        self.clock = HandClock()
        self.inbox = Inbox(ThreadWaiter())
        self.events: queue.Queue[EngineEvent] = queue.Queue()
        self.monitor = EngineMonitor(self.inbox, self.events.put, self.clock)
        self.exchange = OneRankExchange(self.monitor)
        self.model = ToyModel()
        self.error: BaseException | None = None
        self.engine = Engine(
            member=ME,
            runner=ModelRunner(self.model, self.exchange),
            scheduler=scheduler(replicator),
            inbox=self.inbox,
            monitor=self.monitor,
            post=self.events.put,
            clock=self.clock,
            replicator=replicator,
        )
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:  # noqa: BLE001  (handed to the test)
            self.error = error

    def event(self) -> EngineEvent:
        return self.events.get(timeout=PATIENCE_S)

    def submit(self, request: Submit, number: int = 1) -> None:
        assert self.inbox.put(Arrival(origin=origin(number), submit=request))

    def new_map(self, epoch: int, *members: Member, waits_s: float = 0.0) -> None:
        expert_map = ExpertMap(
            epoch=Epoch(epoch),
            num_experts=1,
            members=members or (ME,),
            placement=np.zeros((1, 2, 1), dtype=np.int16),
        )
        now = self.clock.now()
        waits_until = now + waits_s if waits_s else 0.0
        self.inbox.put(NewMap(expert_map=expert_map, seen_at=now, waits_until=waits_until))

    def wake(self, epoch: int, step: int) -> None:
        self.inbox.put(
            Wake(
                rank=PEER.rank,
                incarnation=PEER.incarnation,
                epoch=Epoch(epoch),
                step=Step(step),
            )
        )

    def until_asleep(self) -> None:
        """The engine sleeps with an empty inbox. It wakes by nothing but what a test puts. The
        inbox is looked at first: it is emptied by an engine that does not sleep any more."""
        for _ in range(PATIENCE_S * 1000):
            if not self.inbox._items and self.monitor._parked:
                return
            threading.Event().wait(0.001)
        raise AssertionError("the engine does not go to sleep")

    def tokens_of(self, session: str) -> tuple[list[int], FinishReason | None]:
        """Everything up to the session's end, other events skipped."""
        ids: list[int] = []
        while True:
            event = self.event()
            for reply in replies(event):
                if reply.session == session:
                    assert reply.index == len(ids)
                    ids += reply.ids
                    if reply.finish or reply.error:
                        return ids, reply.finish

    def end(self) -> None:
        self.inbox.put(Stop())
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


def replies(event: EngineEvent) -> list[SessionTokens]:
    if not isinstance(event, StepTokens):
        return []
    return [reply for batch in event.sessions.values() for reply in batch]


@pytest.fixture
def rank() -> Iterator[Rank]:
    one = Rank()
    one.thread.start()
    yield one
    one.end()
    assert one.error is None


@pytest.fixture
def member(rank: Rank) -> Rank:
    """In the map of epoch 1, and asleep after its first step."""
    rank.new_map(1)
    assert isinstance(rank.event(), Adopted)
    rank.until_asleep()
    return rank


def expected(request: Submit) -> tuple[list[int], FinishReason]:
    return alone(request.tokens, request.sampling)


def test_sessions_are_served_as_if_alone(member: Rank) -> None:
    requests = [submit(f"s{i}", tuple(range(1, 2 + i * 3)), max_tokens=9) for i in range(3)]
    for request in requests:
        member.submit(request)
    got: dict[str, list[int]] = {r.session: [] for r in requests}
    ends: dict[str, FinishReason] = {}
    while len(ends) < 3:
        for reply in replies(member.event()):
            got[reply.session] += reply.ids
            if reply.finish:
                ends[reply.session] = reply.finish
    for request in requests:
        assert (got[request.session], ends[request.session]) == expected(request)


def test_an_engine_in_no_map_keeps_its_sessions_for_the_first_one(rank: Rank) -> None:
    request = submit()
    rank.submit(request)
    rank.new_map(1, PEER)
    rank.until_asleep()
    assert rank.exchange.begun == []
    assert rank.engine.snapshot().load.waiting == 1
    rank.new_map(2)
    assert rank.tokens_of("s") == expected(request)
    assert rank.exchange.adopted == [2]


def test_an_epoch_begins_with_step_zero_even_without_work(member: Rank) -> None:
    assert member.exchange.begun == [(1, 0, 0, False)]
    member.new_map(2)
    member.event()
    member.until_asleep()
    assert member.exchange.begun[1:] == [(2, 0, 0, False)]


def test_only_the_newest_map_is_adopted(member: Rank) -> None:
    gate = threading.Event()
    member.exchange.on_dispatch = lambda: stay_until(gate)
    member.new_map(2)
    for epoch in (4, 3, 5):
        member.new_map(epoch)
    gate.set()
    while member.exchange.adopted[-1] != 5:
        member.event()
    member.until_asleep()
    assert 3 not in member.exchange.adopted
    assert member.exchange.begun[-1][:2] == (5, 0)


# a planned map


def test_a_planned_map_is_adopted_after_the_step_in_which_all_know_of_it(member: Rank) -> None:
    exchange = member.exchange

    def on_dispatch() -> None:
        if len(exchange.begun) == 3:
            member.new_map(2, waits_s=1.0)
        exchange.peers_know_next = len(exchange.begun) >= 5
        exchange.may_change_map = len(exchange.begun) != 5

    exchange.on_dispatch = on_dispatch
    request = submit(max_tokens=12)
    member.submit(request)
    assert member.tokens_of("s") == expected(request)
    member.until_asleep()
    epochs = [epoch for epoch, *_ in exchange.begun]
    assert epochs[:6] == [1] * 6
    assert set(epochs[6:]) == {2}
    assert exchange.begun[5][2] == 0, "a step without tokens, as the exchange could not change yet"
    assert exchange.knew_next[:7] == [False, False, False, True, True, True, False]
    snapshot = member.engine.snapshot()
    assert snapshot.steps_abandoned == 0
    assert not snapshot.adoptions[-1].abandoned


@pytest.mark.parametrize(
    ("cause", "num_abandoned"), [("time", 0), ("much time", 1), ("link", 1), ("death", 1)]
)
def test_a_planned_map_waits_no_longer_than_it_may(
    member: Rank, cause: str, num_abandoned: int
) -> None:
    """A long step is ended and counts, though some peer does not know of the map by then."""

    def on_dispatch() -> None:
        if len(member.exchange.begun) == 3:
            member.new_map(2, waits_s=1.0)
        if len(member.exchange.begun) == 5:
            if cause.endswith("time"):
                member.clock.time += 1.5 if cause == "time" else 1.1 + STEP_PATIENCE_S
            elif cause == "link":
                member.inbox.end_patience()
            else:
                member.new_map(3)

    member.exchange.on_dispatch = on_dispatch
    request = submit(max_tokens=12)
    member.submit(request)
    assert member.tokens_of("s") == expected(request)
    epoch = 3 if cause == "death" else 2
    assert [epoch for epoch, *_ in member.exchange.begun][4:6] == [1, epoch]
    assert member.engine.snapshot().steps_abandoned == num_abandoned


def test_a_planned_map_does_not_wait_behind_one_that_is_in_force(member: Rank) -> None:
    def on_dispatch() -> None:
        if len(member.exchange.begun) == 3:
            member.new_map(2)
            member.new_map(3, waits_s=1.0)

    member.exchange.on_dispatch = on_dispatch
    request = submit(max_tokens=12)
    member.submit(request)
    assert member.tokens_of("s") == expected(request)
    assert [epoch for epoch, *_ in member.exchange.begun][2:4] == [1, 3]
    assert member.engine.snapshot().steps_abandoned == 1


def test_who_has_agreed_to_adopt_does_not_wait_for_a_newer_map(member: Rank) -> None:
    """The others have moved on."""

    def on_dispatch() -> None:
        if len(member.exchange.begun) == 3:
            member.new_map(2, waits_s=1.0)
        if len(member.exchange.begun) == 4:
            member.exchange.peers_know_next = True
            member.new_map(3, waits_s=1.0)

    member.exchange.on_dispatch = on_dispatch
    request = submit(max_tokens=12)
    member.submit(request)
    assert member.tokens_of("s") == expected(request)
    assert [epoch for epoch, *_ in member.exchange.begun][3:5] == [1, 3]
    assert member.engine.snapshot().steps_abandoned == 0


def test_who_sleeps_adopts_a_planned_map_at_once(member: Rank) -> None:
    member.new_map(2, waits_s=1.0)
    assert isinstance(member.event(), Adopted)


def test_who_leaves_steps_with_the_others_until_all_know(member: Rank) -> None:
    def on_dispatch() -> None:
        if len(member.exchange.begun) == 3:
            member.new_map(2, PEER, waits_s=1.0)
        member.exchange.peers_know_next = len(member.exchange.begun) >= 6

    member.exchange.on_dispatch = on_dispatch
    member.exchange.peers_have_work = True
    member.wake(1, 1)
    while len(member.exchange.begun) < 6:
        threading.Event().wait(0.001)
    member.until_asleep()
    assert not any(isinstance(e, Fenced) for e in member.events.queue), "some may be in that step"
    member.clock.time += FAREWELL_S
    member.inbox.notify()
    while not isinstance(event := member.event(), Fenced):
        pass
    assert event == Fenced(epoch=Epoch(2))
    assert len(member.exchange.begun) == 6
    assert member.engine.snapshot().steps_abandoned == 0


# a step that does not take place


def test_an_abandoned_step_is_replayed_under_the_next_map_and_no_token_is_lost(
    member: Rank,
) -> None:
    num_dispatches = 0

    def lose_a_peer_every_third_time() -> None:
        nonlocal num_dispatches
        num_dispatches += 1
        if num_dispatches % 3 == 0:
            member.clock.time += 1.0
            member.new_map(num_dispatches)

    member.exchange.on_dispatch = lose_a_peer_every_third_time
    request = submit(tokens=tuple(range(1, 20)), max_tokens=12)
    member.submit(request)
    assert member.tokens_of("s") == expected(request)
    member.exchange.on_dispatch = lambda: None
    member.until_asleep()
    snapshot = member.engine.snapshot()
    assert snapshot.steps_abandoned >= 4
    assert snapshot.tokens_generated == 12
    assert snapshot.steps_committed == len(member.exchange.begun) - snapshot.steps_abandoned
    assert all(entry.abandoned for entry in snapshot.adoptions[1:])
    first_steps = [begun for begun in member.exchange.begun if begun[1] == 0]
    assert [epoch for epoch, *_ in first_steps] == member.exchange.adopted


def test_after_an_abandoned_step_the_engine_sleeps_until_the_newer_map_is_here(
    member: Rank,
) -> None:
    def peer_has_moved_on() -> None:
        if member.exchange.begun[-1][0] == 1:
            raise StepAbandoned("a peer's message is of epoch 2")

    member.exchange.on_dispatch = peer_has_moved_on
    request = submit()
    member.submit(request)
    assert member.event() == SendWake(epoch=Epoch(1), step=Step(1))
    member.until_asleep()
    member.wake(1, 1)
    member.submit(submit("other"))
    member.until_asleep()
    assert len(member.exchange.begun) == 2
    member.new_map(2)
    assert member.tokens_of("s") == expected(request)


def test_a_session_cancelled_while_behind_is_not_replayed(member: Rank) -> None:
    def peer_has_moved_on() -> None:
        if member.exchange.begun[-1][0] == 1:
            raise StepAbandoned("a peer's message is of epoch 2")

    member.exchange.on_dispatch = peer_has_moved_on
    member.submit(submit())
    member.until_asleep()
    member.inbox.put(Cancel(session=SessionId("s"), attempt=Attempt(0)))
    assert member.tokens_of("s") == ([], FinishReason.CANCELLED)
    member.new_map(2)
    assert isinstance(member.event(), Adopted)
    member.until_asleep()
    assert member.exchange.begun[-1] == (2, 0, 0, False)


def test_a_rank_that_no_map_follows_after_an_abandoned_step_gives_itself_up(member: Rank) -> None:
    def peer_has_moved_on() -> None:
        raise StepAbandoned("a peer's message is of epoch 2")

    member.exchange.on_dispatch = peer_has_moved_on
    member.submit(submit())
    member.until_asleep()
    member.clock.time += STRANDED_S + 1
    member.inbox.notify()
    assert isinstance(member.event(), SendWake)
    assert member.event() == Stranded(epoch=Epoch(1))
    member.thread.join(PATIENCE_S)
    assert not member.thread.is_alive()


def test_the_times_of_an_adoption_are_kept(member: Rank) -> None:
    member.clock.time = 200.0
    member.exchange.on_dispatch = lambda: setattr(member.clock, "time", 203.0)
    member.submit(submit(num_emitted=2, tokens=(1, 2, 3, 4)))
    member.until_asleep()
    while not member.events.empty():
        member.event()
    member.clock.time = 300.0
    member.exchange.on_dispatch = lambda: setattr(member.clock, "time", 305.0)
    member.new_map(2, ME, PEER)
    event = member.event()
    assert isinstance(event, Adopted)
    assert event.expert_map.members == (ME, PEER)
    member.until_asleep()
    first, second = member.engine.snapshot().adoptions
    assert (first.epoch, first.reprefill_tokens) == (1, 4)
    assert (second.seen_at, second.adopted_at, second.replayed_at) == (300.0, 300.0, 305.0)
    assert not second.abandoned


# sleep and wake


def test_an_idle_engine_runs_no_step(member: Rank) -> None:
    member.inbox.put(DropOrigin(origin=origin()))
    member.until_asleep()
    assert len(member.exchange.begun) == 1


def test_the_first_to_have_work_wakes_the_others_before_its_step(member: Rank) -> None:
    member.submit(submit(max_tokens=2))
    assert member.event() == SendWake(epoch=Epoch(1), step=Step(1))
    event = member.event()
    assert isinstance(event, StepTokens)
    assert event.step == 1
    member.until_asleep()
    assert member.exchange.begun[-1] == (1, 3, 0, False)
    member.submit(submit("next", max_tokens=1))
    member.event()
    assert member.event() == SendWake(epoch=Epoch(1), step=Step(4))


def test_a_wake_for_the_next_step_is_obeyed_without_work_of_ones_own(member: Rank) -> None:
    member.wake(1, 1)
    member.until_asleep()
    assert member.exchange.begun == [(1, 0, 0, False), (1, 1, 0, False)]
    assert member.events.empty()


@pytest.mark.parametrize("place", [(1, 0), (0, 9), (2, 1)], ids=["past", "old", "future"])
def test_a_wake_for_another_step_is_not_obeyed(member: Rank, place: tuple[int, int]) -> None:
    member.wake(*place)
    member.until_asleep()
    assert len(member.exchange.begun) == 1


def test_a_wake_that_comes_during_the_last_step_is_not_lost(member: Rank) -> None:
    def wake_for_the_next() -> None:
        if len(member.exchange.begun) == 2:
            member.wake(1, 2)
            member.wake(1, 1)  # late

    member.exchange.on_dispatch = wake_for_the_next
    member.wake(1, 1)
    member.until_asleep()
    assert [step for _, step, *_ in member.exchange.begun] == [0, 1, 2]


def test_a_wake_that_comes_before_its_map_is_not_lost(member: Rank) -> None:
    member.wake(2, 1)
    member.new_map(2)
    member.event()
    member.until_asleep()
    assert [begun[:2] for begun in member.exchange.begun] == [(1, 0), (2, 0), (2, 1)]


def test_while_a_peer_has_work_everybody_steps(member: Rank) -> None:
    def work_until_step_five() -> None:
        member.exchange.peers_have_work = member.exchange.begun[-1][1] < 5

    member.exchange.on_dispatch = work_until_step_five
    member.wake(1, 1)
    member.until_asleep()
    assert [begun[1:] for begun in member.exchange.begun] == [(step, 0, False) for step in range(6)]


# the heart


def test_a_sleeping_engine_is_not_an_old_one(member: Rank) -> None:
    member.clock.time += 1000
    assert member.engine.snapshot().engine_age_ms == 0


def test_a_stuck_step_ages_and_one_that_waits_for_peers_names_them(member: Rank) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def get_stuck() -> None:
        member.monitor.beat((PEER.rank,))
        reached.set()
        stay_until(go_on)

    member.exchange.on_dispatch = get_stuck
    member.wake(1, 1)
    assert reached.wait(PATIENCE_S)
    member.clock.time += 0.25
    snapshot = member.engine.snapshot()
    go_on.set()
    assert snapshot.engine_age_ms == pytest.approx(250)
    assert snapshot.waiting_for == (PEER.rank,)
    assert (snapshot.epoch, snapshot.step) == (1, 1)
    member.exchange.on_dispatch = lambda: None
    member.until_asleep()
    assert member.engine.snapshot().waiting_for == ()


def test_a_suspicion_names_the_step_in_which_it_arose(member: Rank) -> None:
    member.exchange.on_dispatch = lambda: member.monitor.suspect(
        PEER.rank, SuspicionReason.EXCHANGE, "late"
    )
    member.wake(1, 1)
    assert member.event() == Suspect(
        rank=PEER.rank,
        reason=SuspicionReason.EXCHANGE,
        epoch=Epoch(1),
        step=Step(1),
        detail="late",
    )


# the end


def test_a_map_that_leaves_the_rank_out_ends_the_engine(member: Rank) -> None:
    member.new_map(2, PEER)
    assert member.event() == Fenced(epoch=Epoch(2))
    member.thread.join(PATIENCE_S)
    assert not member.thread.is_alive()


def test_a_successor_in_the_map_is_not_this_incarnation(member: Rank) -> None:
    member.new_map(2, Member(rank=ME.rank, incarnation=Incarnation(2)))
    assert member.event() == Fenced(epoch=Epoch(2))


def test_a_rank_fenced_in_the_middle_of_a_step_commits_nothing_of_it(member: Rank) -> None:
    member.exchange.on_dispatch = lambda: member.new_map(2, PEER)
    member.submit(submit())
    assert isinstance(member.event(), SendWake)
    assert member.event() == Fenced(epoch=Epoch(2))
    assert member.engine.snapshot().tokens_generated == 0


def test_stop_ends_an_engine_in_no_map(rank: Rank) -> None:
    rank.until_asleep()
    rank.inbox.put(Stop())
    rank.thread.join(PATIENCE_S)
    assert not rank.thread.is_alive()


def test_an_error_in_the_step_leaves_run() -> None:
    rank = Rank()

    def fail() -> None:
        raise ZeroDivisionError

    rank.exchange.on_dispatch = fail
    rank.thread.start()
    rank.new_map(1)
    rank.thread.join(PATIENCE_S)
    assert isinstance(rank.error, ZeroDivisionError)


# replies outside of a step


def test_a_refusal_is_answered_to_its_origin_even_in_no_map(rank: Rank) -> None:
    rank.submit(submit(tokens=(1,) * 100), number=7)
    event = rank.event()
    assert isinstance(event, StepTokens)
    ((number, (reply,)),) = event.sessions.items()
    assert number == origin(7)
    assert reply.error is not None


def test_a_cancelled_session_is_told_so_and_makes_no_more_tokens(member: Rank) -> None:
    def cancel_in_the_second_step() -> None:
        if len(member.exchange.begun) == 3:
            member.inbox.put(Cancel(session=SessionId("s"), attempt=Attempt(0)))

    member.exchange.on_dispatch = cancel_in_the_second_step
    request = submit(max_tokens=40)
    member.submit(request)
    ids, finish = member.tokens_of("s")
    assert finish is FinishReason.CANCELLED
    assert ids == expected(request)[0][:2]
    member.until_asleep()
    assert member.events.empty()


def test_a_dropped_origin_hears_nothing_more(member: Rank) -> None:
    both_are_sent = threading.Event()

    def drop_in_the_second_step() -> None:
        stay_until(both_are_sent)
        if len(member.exchange.begun) == 3:
            member.submit(submit("refused", (1,) * 100))
            member.inbox.put(DropOrigin(origin=origin()))

    member.exchange.on_dispatch = drop_in_the_second_step
    member.submit(submit("other", max_tokens=40), number=2)
    member.submit(submit(max_tokens=40))
    both_are_sent.set()
    member.until_asleep()
    served: list[Origin] = []
    while not member.events.empty():
        event = member.event()
        served += event.sessions if isinstance(event, StepTokens) else []
    assert served.count(origin(1)) in (1, 2)  # steps before the drop
    assert served.count(origin(2)) == 40
    load = member.engine.snapshot().load
    assert (load.running, load.waiting, load.tokens) == (0, 0, 0)


# KV replicas


class Copying:
    """A rank whose peer keeps replicas of its blocks, of 4 tokens each."""

    def __init__(self, blocks_per_pump: int) -> None:
        cache = ArrayCache(np.zeros((32, 8), dtype=np.uint8))
        self.channel = Channel(PEER)
        endpoint = Endpoint(self.channel)
        writer = ReplicaWriter(cache, endpoint, rank=ME.rank, blocks_per_pump=blocks_per_pump)
        self.rank = Rank(writer)

    def until_sent(self, num_blocks: int) -> None:
        for _ in range(PATIENCE_S * 1000):
            if len(self.channel.sent) >= num_blocks:
                return
            threading.Event().wait(0.001)
        raise AssertionError(f"{len(self.channel.sent)} blocks were sent, not {num_blocks}")


@pytest.fixture
def copying(request: pytest.FixtureRequest) -> Iterator[Copying]:
    one = Copying(request.param)
    one.rank.thread.start()
    one.rank.new_map(1, ME, PEER)
    one.rank.event()
    one.rank.until_asleep()
    yield one
    one.rank.end()
    assert one.rank.error is None


@pytest.mark.parametrize("copying", [8], indirect=True)
def test_copies_go_to_another_member_while_a_session_runs(copying: Copying) -> None:
    request = submit(tokens=tuple(range(1, 10)), max_tokens=8)
    copying.rank.submit(request)
    assert copying.rank.tokens_of("s") == expected(request)
    copying.rank.until_asleep()
    assert len(copying.channel.sent) == (9 + 8 - 2) // 4


@pytest.mark.parametrize("copying", [8], indirect=True)
def test_who_has_left_the_map_gets_no_copies(copying: Copying) -> None:
    copying.rank.new_map(2, ME)
    copying.rank.event()
    request = submit(tokens=tuple(range(1, 10)), max_tokens=8)
    copying.rank.submit(request)
    assert copying.rank.tokens_of("s") == expected(request)
    copying.rank.until_asleep()
    assert copying.channel.sent == []


@pytest.mark.parametrize("copying", [1], indirect=True)
def test_what_was_offered_goes_out_while_the_engine_waits_for_a_map(copying: Copying) -> None:
    rank = copying.rank

    def move_on_after_two_steps() -> None:
        if rank.exchange.begun[-1][:2] == (1, 3):
            raise StepAbandoned("a peer's message is of epoch 2")

    rank.exchange.on_dispatch = move_on_after_two_steps
    request = submit(tokens=tuple(range(1, 20)), max_tokens=8)
    rank.submit(request)
    copying.until_sent(4)
    assert rank.exchange.begun[-1][:2] == (1, 3)
    rank.until_asleep()
    rank.new_map(2, ME, PEER)
    assert rank.tokens_of("s") == expected(request)
