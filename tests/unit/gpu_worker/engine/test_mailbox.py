"""The inbox: bounded, in order, and no notice is lost."""

from __future__ import annotations

import threading

import numpy as np

from gpu_worker.engine.mailbox import Arrival, DropOrigin, Inbox, NewMap, Stop, ThreadWaiter
from shared.expert_map import ExpertMap
from shared.types import Attempt, Epoch, Incarnation, Member, RankId, SessionId, Step
from shared.wire import Cancel, Wake
from tests.unit.gpu_worker.engine.toy import origin, submit


def inbox(arrivals_max: int = 2, arrival_tokens_max: int = 100) -> Inbox:
    return Inbox(ThreadWaiter(), arrivals_max=arrivals_max, arrival_tokens_max=arrival_tokens_max)


def arrival(num_tokens: int = 3) -> Arrival:
    return Arrival(origin=origin(), submit=submit(tokens=(1,) * num_tokens))


def new_map(epoch: int) -> NewMap:
    return NewMap(
        expert_map=ExpertMap(
            epoch=Epoch(epoch),
            num_experts=1,
            members=(Member(rank=RankId(0), incarnation=Incarnation(1)),),
            placement=np.zeros((1, 1, 1), dtype=np.int16),
        ),
        seen_at=0.0,
    )


def cancel() -> Cancel:
    return Cancel(session=SessionId("s"), attempt=Attempt(0))


def wake(epoch: int = 1, step: int = 3) -> Wake:
    return Wake(rank=RankId(1), incarnation=Incarnation(1), epoch=Epoch(epoch), step=Step(step))


def test_items_come_out_in_order_and_once() -> None:
    box = inbox()
    items = [arrival(), cancel(), DropOrigin(origin=origin()), new_map(1), wake(), Stop()]
    assert all(box.put(item) for item in items)
    assert box.drain() == items
    assert box.drain() == []


def test_arrivals_beyond_their_number_are_refused_until_drained() -> None:
    box = inbox(arrivals_max=2)
    assert [box.put(arrival()) for _ in range(3)] == [True, True, False]
    assert len(box.drain()) == 2
    assert box.put(arrival())


def test_arrivals_beyond_a_sum_of_tokens_are_refused_but_one_always_fits() -> None:
    box = inbox(arrivals_max=9, arrival_tokens_max=100)
    assert box.put(arrival(500))
    assert not box.put(arrival(1))
    box.drain()
    assert [box.put(arrival(40)) for _ in range(3)] == [True, True, False]


def test_cancels_have_a_bound_of_their_own() -> None:
    box = inbox(arrivals_max=1)
    taken = [box.put(cancel()) for _ in range(20)]
    assert taken.count(True) == Inbox.CANCELS_PER_ARRIVAL
    assert box.put(arrival())
    assert len(box.drain()) == Inbox.CANCELS_PER_ARRIVAL + 1
    assert box.put(cancel())


def test_wakes_that_say_nothing_more_are_not_kept() -> None:
    box = inbox()
    for epoch, step in ((1, 3), (1, 3), (1, 2), (2, 0), (1, 9), (2, 1)):
        assert box.put(wake(epoch, step))
    assert box.drain() == [wake(1, 3), wake(2, 0), wake(2, 1)]
    assert box.put(wake(1, 3))
    assert box.drain() == [wake(1, 3)]


def test_what_nobody_may_miss_is_taken_though_the_inbox_is_full() -> None:
    box = inbox(arrivals_max=1)
    for _ in range(10):
        box.put(arrival())
        box.put(cancel())
    assert all(box.put(i) for i in (DropOrigin(origin=origin()), new_map(1), wake(), Stop()))


def test_newest_epoch_never_falls_and_outlives_the_drain() -> None:
    box = inbox()
    assert box.newest_epoch == 0
    box.put(new_map(5))
    box.put(new_map(4))
    box.drain()
    assert box.newest_epoch == 5


def test_a_put_before_the_wait_ends_it_at_once() -> None:
    box = inbox()
    box.put(wake())
    box.wait(3600)
    assert box.drain() == [wake()]


def test_a_refused_item_wakes_nobody() -> None:
    box = inbox(arrivals_max=1)
    box.put(arrival())
    box.wait(3600)
    assert not box.put(arrival())
    waiter = threading.Thread(target=box.wait, args=(3600,))
    waiter.start()
    waiter.join(0.02)
    assert waiter.is_alive()
    box.put(Stop())
    waiter.join(10)
    assert not waiter.is_alive()


def test_puts_of_many_threads_all_arrive() -> None:
    box = inbox(arrivals_max=1000, arrival_tokens_max=1000)
    threads = [
        threading.Thread(target=lambda: [box.put(arrival()) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    got = []
    for _ in range(200):
        if len(got) == 200:
            break
        box.wait(10)
        got += box.drain()
    for thread in threads:
        thread.join(10)
    assert len(got) == 200
