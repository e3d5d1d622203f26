"""The exchange between real processes, over real Mooncake and through shared memory: the same bits
as in one process, and what death, hanging and late writes of a peer do to the others."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import pytest

from shared.clock import SystemClock
from shared.expert_map import ExpertMap
from shared.types import Epoch, MemoryHandle, RankId, SuspicionReason
from shared.wire import OpenRegion
from tests.support.exchange_child import H, K, main, make_map, member, run_step
from tests.support.local_exchange import LocalHub

WAIT_S = 120.0
FOREVER_MS = 1e9
ENDLESS = 10**9
NUM_MAPS = 40

pytestmark = pytest.mark.timeout(300)


class Path(Enum):
    """BOTH: ranks 0 and 1 share memory, as if the others were on another host."""

    MOONCAKE = "mooncake"
    MEMORY = "memory"
    BOTH = "both"


either_path = pytest.mark.parametrize("over", [Path.MOONCAKE, Path.MEMORY])


class Rank:
    """The parent's end of one child."""

    def __init__(self, rank: int, num_ranks: int, deadline_ms: float, shares_memory: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.rank = rank
        self._pipe, theirs = context.Pipe()
        self._seen: list[tuple[str, Any]] = []
        self.process = context.Process(
            target=main, args=(rank, num_ranks, deadline_ms, shares_memory, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def tell(self, kind: str, value: Any = None) -> None:
        self._pipe.send((kind, value))

    def expect(self, kind: str, fits: Callable[[Any], bool] = lambda value: True) -> Any:
        """The next event of this kind, waiting for it; others are kept."""
        while True:
            for event in self._seen:
                if event[0] == kind and fits(event[1]):
                    self._seen.remove(event)
                    return event[1]
            assert self._pipe.poll(WAIT_S), f"rank {self.rank}: no {kind!r}, only {self._seen}"
            self._seen.append(self._pipe.recv())

    def has_said(self, kind: str) -> bool:
        while self._pipe.poll():
            self._seen.append(self._pipe.recv())
        return any(seen == kind for seen, _ in self._seen)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def open_links(ranks: list[Rank]) -> int:
    """Opens every link that is not open; returns how many."""
    count = 0
    for rank in ranks:
        rank.tell("link_requests")
        for target, request in rank.expect("link_requests"):
            ranks[target.rank].tell("accept_link", request)
            rank.tell("connect", ranks[target.rank].expect("link_accepted"))
            rank.expect("connected")
            count += 1
    return count


@pytest.fixture
def start() -> Iterator[Callable[..., list[Rank]]]:
    started: list[Rank] = []

    def begin(
        num_ranks: int, deadline_ms: float = FOREVER_MS, *, over: Path = Path.MOONCAKE
    ) -> list[Rank]:
        shares = {Path.MOONCAKE: (), Path.MEMORY: range(num_ranks), Path.BOTH: range(2)}[over]
        started.extend(Rank(r, num_ranks, deadline_ms, r in shares) for r in range(num_ranks))
        open_links(started)
        return started

    yield begin
    for rank in started:
        rank.process.kill()
        rank.process.join()


class NoFaultMonitor:
    """A monitor for runs without faults."""

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch

    def newest_epoch(self) -> Epoch:
        return self._epoch

    def beat(self, waiting_for: object) -> None:
        pass

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        raise AssertionError(f"suspected {rank}: {detail}")


def oracle(expert_map: ExpertMap, num_steps: int) -> dict[int, list[str]]:
    """What the same steps give in one process."""
    hub = LocalHub(expert_map.num_ranks, H, K)
    members = {each.rank: each for each in expert_map.members}

    def run_steps(rank: RankId) -> list[str]:
        monitor = NoFaultMonitor(expert_map.epoch)
        exchange = hub.exchange(members[rank], monitor, SystemClock(), FOREVER_MS)
        exchange.adopt(expert_map)
        return [run_step(exchange, expert_map, rank, step) for step in range(num_steps)]

    ranks = [m.rank for m in expert_map.members]
    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(run_steps, ranks), strict=True))


def run_and_compare(ranks: list[Rank], expert_map: ExpertMap, num_steps: int) -> None:
    for rank in ranks:
        rank.tell("epoch", expert_map.epoch)
        rank.tell("run", (expert_map, num_steps))
    expected = oracle(expert_map, num_steps)
    for rank in ranks:
        assert rank.expect("done") == expected[rank.rank]


@pytest.mark.parametrize("over", Path)
def test_four_processes_get_the_bits_of_one(start: Callable[..., list[Rank]], over: Path) -> None:
    ranks = start(4, over=over)
    for rank in ranks:
        rank.tell("memory_links")
        shares = {Path.MOONCAKE: 0, Path.MEMORY: 4, Path.BOTH: 2}[over]
        expected = [member(r) for r in range(shares) if r != rank.rank < shares]
        assert list(rank.expect("memory_links")) == expected
    run_and_compare(ranks, make_map(1, range(4), 4), num_steps=40)
    run_and_compare(ranks, make_map(2, range(4), 4), num_steps=11)


def test_a_rank_that_is_stopped_at_any_moment_of_a_write_alters_nothing(
    start: Callable[..., list[Rank]],
) -> None:
    """It lasts long enough that many stops hit a message that is half written."""
    ranks = start(3, over=Path.MEMORY)
    three = make_map(1, range(3), 3)
    for rank in ranks:
        rank.tell("run", (three, 300))
    moments = random.Random(1)
    while not all(rank.has_said("done") for rank in ranks):
        ranks[2].signal(signal.SIGSTOP)
        time.sleep(moments.uniform(0, 0.005))
        ranks[2].signal(signal.SIGCONT)
        time.sleep(moments.uniform(0, 0.005))
    expected = oracle(three, 300)
    for rank in ranks:
        assert rank.expect("done") == expected[rank.rank]


@either_path
def test_no_step_is_abandoned_when_all_adopt_a_map_after_the_same_one(
    start: Callable[..., list[Rank]], over: Path
) -> None:
    """However far behind one of them is: what it has yet to read stays, and who has moved on has
    sent what it owed."""
    ranks = start(3, over=over)
    maps = [make_map(epoch, range(3), 3) for epoch in range(1, NUM_MAPS + 1)]
    for rank in ranks:
        rank.tell("run_maps", (maps, 2))
    moments = random.Random(1)
    while not all(rank.has_said("done") for rank in ranks):
        assert not any(rank.has_said("abandoned") for rank in ranks)
        late = moments.choice(ranks)
        late.signal(signal.SIGSTOP)
        time.sleep(moments.uniform(0, 0.01))
        late.signal(signal.SIGCONT)
        time.sleep(moments.uniform(0, 0.01))
    expected = [oracle(each, 2) for each in maps]
    for rank in ranks:
        assert rank.expect("done") == [digest for each in expected for digest in each[rank.rank]]


@either_path
def test_death_raises_suspicion_and_only_the_new_epoch_ends_the_wait(
    start: Callable[..., list[Rank]], over: Path
) -> None:
    ranks = start(3, deadline_ms=40.0, over=over)
    for rank in ranks:
        rank.tell("run", (make_map(1, range(3), 3), ENDLESS))
    for rank in ranks:
        rank.expect("adopted")
    ranks[2].signal(signal.SIGKILL)
    survivors = ranks[:2]
    for rank in survivors:
        rank.expect("suspect", lambda value: value[0] == 2)
    assert not any(rank.has_said("abandoned") for rank in survivors)
    run_after_verdict(survivors, make_map(2, range(2), 3), num_steps=40)


@either_path
def test_a_peer_that_moved_on_ends_the_wait_of_one_that_has_not_heard_of_the_epoch(
    start: Callable[..., list[Rank]], over: Path
) -> None:
    ranks = start(3, deadline_ms=40.0, over=over)
    for rank in ranks:
        rank.tell("run", (make_map(1, range(3), 3), ENDLESS))
    for rank in ranks:
        rank.expect("adopted")
    ranks[2].signal(signal.SIGKILL)
    ranks[0].expect("suspect", lambda value: value[0] == 2)
    two = make_map(2, range(2), 3)
    ranks[0].tell("epoch", two.epoch)
    ranks[0].expect("abandoned")
    ranks[0].tell("run", (two, 20))
    ranks[1].expect("abandoned")
    ranks[1].tell("epoch", two.epoch)
    ranks[1].tell("run", (two, 20))
    expected = oracle(two, 20)
    for rank in ranks[:2]:
        assert rank.expect("done") == expected[rank.rank]


@either_path
def test_a_stopped_peer_that_wakes_up_after_its_verdict_changes_nothing(
    start: Callable[..., list[Rank]], over: Path
) -> None:
    ranks = start(3, deadline_ms=40.0, over=over)
    for rank in ranks:
        rank.tell("run", (make_map(1, range(3), 3), ENDLESS))
    for rank in ranks:
        rank.expect("adopted")
    ranks[2].signal(signal.SIGSTOP)
    survivors = ranks[:2]
    for rank in survivors:
        rank.expect("suspect", lambda value: value[0] == 2)
    run_after_verdict(survivors, make_map(2, range(2), 3), num_steps=40)
    two = make_map(3, range(2), 3)
    for rank in survivors:
        rank.tell("epoch", two.epoch)
        rank.tell("run", (two, 400))
    ranks[2].signal(signal.SIGCONT)
    expected = oracle(two, 400)
    for rank in survivors:
        assert rank.expect("done") == expected[rank.rank]
    assert not ranks[2].has_said("done")


@either_path
def test_a_fenced_process_goes_on_as_a_new_incarnation_and_reads_nothing_of_the_old_one(
    start: Callable[..., list[Rank]], over: Path
) -> None:
    ranks = start(3, deadline_ms=40.0, over=over)
    for rank in ranks:
        rank.tell("run", (make_map(1, range(3), 3), ENDLESS))
    for rank in ranks:
        rank.expect("adopted")
    ranks[2].signal(signal.SIGSTOP)
    survivors = ranks[:2]
    for rank in survivors:
        rank.expect("suspect", lambda value: value[0] == 2)
    run_after_verdict(survivors, make_map(2, range(2), 3), num_steps=40)
    ranks[2].signal(signal.SIGCONT)
    ranks[2].tell("epoch", make_map(2, range(2), 3).epoch)
    ranks[2].expect("abandoned")
    given_before = region_for(ranks[0], ranks[2])
    ranks[2].tell("renew")
    ranks[2].expect("renewed")
    assert region_for(ranks[0], ranks[2]) != given_before
    for rank in survivors:
        rank.tell("on_renewed", 2)
    open_links(ranks)
    run_and_compare(ranks, make_map(3, range(3), 3, renewed=[2]), num_steps=40)


def region_for(source: Rank, target: Rank) -> tuple[int, MemoryHandle | None]:
    """Where the source's first request leads: its address, or its memory."""
    request = OpenRegion(source=member(source.rank), transfer_name="", generation=1)
    target.tell("accept_link", request)
    opened, _ = target.expect("link_accepted")
    return (0 if opened.memory else opened.address), opened.memory


def test_a_peer_that_hung_beyond_a_writes_patience_is_served_over_a_new_link(
    start: Callable[..., list[Rank]],
) -> None:
    ranks = start(3, deadline_ms=40.0)
    three = make_map(1, range(3), 3)
    ranks[2].tell("run", (three, 50))
    ranks[2].expect("adopted")
    ranks[2].signal(signal.SIGSTOP)
    for rank in ranks[:2]:
        rank.tell("run", (three, 50))
    for rank in ranks[:2]:
        rank.expect("suspect", lambda value: value[0] == 2)
        wait_for_broken_link(rank)
    ranks[2].signal(signal.SIGCONT)
    open_links(ranks)
    expected = oracle(three, 50)
    for rank in ranks:
        assert rank.expect("done") == expected[rank.rank]


def test_a_paused_host_loses_no_link(start: Callable[..., list[Rank]]) -> None:
    """Mooncake opens no other connection for a second after it has given one up."""
    ranks = start(3, deadline_ms=40.0)
    three = make_map(1, range(3), 3)
    ranks[2].tell("run", (three, 50))
    ranks[2].expect("adopted")
    ranks[2].signal(signal.SIGSTOP)
    for rank in ranks[:2]:
        rank.tell("run", (three, 50))
    for rank in ranks[:2]:
        rank.expect("suspect", lambda value: value[0] == 2)  # so a write to it is under way
        rank.signal(signal.SIGSTOP)
    time.sleep(1.5)
    for rank in ranks:
        rank.signal(signal.SIGCONT)
    expected = oracle(three, 50)
    for rank in ranks:
        assert rank.expect("done") == expected[rank.rank]
        rank.tell("link_requests")
        assert rank.expect("link_requests") == []


def test_no_socket_is_kept_for_a_dead_peer(start: Callable[..., list[Rank]]) -> None:
    ranks = start(4)
    survivor = ranks[0]
    for dead in ranks[1:]:
        dead.signal(signal.SIGKILL)
        dead.process.join()
    wait_for_half_open(survivor, 3)  # Mooncake does nothing by itself
    for dead in ranks[1:]:
        survivor.tell("forget", dead.rank)
    wait_for_half_open(survivor, 0)


def wait_for_half_open(rank: Rank, count: int) -> None:
    until = time.monotonic() + WAIT_S
    while True:
        rank.tell("half_open")
        found = rank.expect("half_open")
        if found == count:
            return
        assert time.monotonic() < until, f"{found} sockets are half open, not {count}"
        time.sleep(0.02)


def run_after_verdict(survivors: list[Rank], expert_map: ExpertMap, num_steps: int) -> None:
    for rank in survivors:
        rank.tell("epoch", expert_map.epoch)
    for rank in survivors:
        rank.expect("abandoned")
    run_and_compare(survivors, expert_map, num_steps)


def wait_for_broken_link(rank: Rank) -> None:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        rank.tell("link_requests")
        if rank.expect("link_requests"):
            return
        time.sleep(0.02)
    raise AssertionError(f"no write of rank {rank.rank} has failed")
