"""LocalExchange against a direct computation, and the rules of its waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.exchange.interface import Dispatched
from shared.clock import SystemClock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId, Step, SuspicionReason
from tests.support.local_exchange import LocalExchange, LocalHub

H, K, E, L = 8, 2, 6, 2
FOREVER_MS = 1e9


class Monitor:
    def __init__(self) -> None:
        self.epoch = Epoch(1)
        self.suspicions: list[tuple[RankId, SuspicionReason]] = []
        self.suspected = threading.Event()

    def newest_epoch(self) -> Epoch:
        return self.epoch

    def beat(self, waiting_for: Sequence[RankId]) -> None:
        pass

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        self.suspicions.append((rank, reason))
        self.suspected.set()


def make_map(epoch: int, ranks: Sequence[int], num_ranks: int = 3) -> ExpertMap:
    placement = np.full((L, num_ranks, E), -1, dtype=np.int16)
    for layer in range(L):
        for expert in range(E):
            for copy in range(min(2, len(ranks))):
                rank = ranks[(expert + copy + layer) % len(ranks)]
                placement[layer, rank, int((placement[layer, rank] >= 0).sum())] = expert
    members = tuple(Member(rank=RankId(r), incarnation=Incarnation(1)) for r in ranks)
    return ExpertMap(epoch=Epoch(epoch), num_experts=E, members=members, placement=placement)


def weights(layer: int, expert: int) -> NDArray[np.float32]:
    return np.float32(1 + expert + 10 * layer) * np.arange(1, H + 1, dtype=np.float32)


def compute(expert_map: ExpertMap, layer: int, rank: int, d: Dispatched) -> NDArray[np.float32]:
    experts = expert_map.placement[layer, rank, d.slots_N]
    assert (experts >= 0).all()
    return np.array(
        [d.x_MH[r] * weights(layer, int(e)) for r, e in zip(d.rows_N, experts, strict=True)],
        dtype=np.float32,
    ).reshape(-1, H)


def run_step(
    exchange: LocalExchange, expert_map: ExpertMap, rank: int, step: int, num_tokens: int
) -> None:
    rng = np.random.default_rng((rank, step))
    exchange.begin_step(
        expert_map.epoch, Step(step), num_tokens=num_tokens, has_work=num_tokens > 0
    )
    for layer in range(L):
        x_TH = rng.standard_normal((num_tokens, H), dtype=np.float32)
        experts_TK = np.array([rng.permutation(E)[:K] for _ in range(num_tokens)], dtype=np.int32)
        experts_TK = experts_TK.reshape(num_tokens, K)
        dispatched = exchange.dispatch(layer, x_TH, experts_TK)
        assert dispatched.any_tokens
        assert dispatched.any_work
        y_TKH = exchange.combine(layer, compute(expert_map, layer, rank, dispatched))
        for t in range(num_tokens):
            for k in range(K):
                assert (y_TKH[t, k] == x_TH[t] * weights(layer, experts_TK[t, k])).all()


def hub_with(monitors: dict[int, Monitor], deadline_ms: float) -> dict[int, LocalExchange]:
    hub = LocalHub(3, H, K)
    return {
        rank: hub.exchange(
            Member(rank=RankId(rank), incarnation=Incarnation(1)),
            monitor,
            SystemClock(),
            deadline_ms,
        )
        for rank, monitor in monitors.items()
    }


def test_each_token_gets_the_output_of_its_own_experts_in_its_own_order() -> None:
    exchanges = hub_with({r: Monitor() for r in range(3)}, FOREVER_MS)
    expert_map = make_map(1, [0, 1, 2])

    def live(rank: int) -> None:
        exchanges[rank].adopt(expert_map)
        for step in range(20):
            run_step(exchanges[rank], expert_map, rank, step, (step * (rank + 1)) % 5 + (rank == 0))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(live, range(3)))


def test_a_step_without_tokens_says_so_to_everyone() -> None:
    exchanges = hub_with({r: Monitor() for r in range(3)}, FOREVER_MS)
    expert_map = make_map(1, [0, 1, 2])

    def live(rank: int) -> Dispatched:
        exchanges[rank].adopt(expert_map)
        exchanges[rank].begin_step(Epoch(1), Step(0), num_tokens=0, has_work=rank == 1)
        none = np.empty((0, K), dtype=np.int32)
        return exchanges[rank].dispatch(0, np.empty((0, H), dtype=np.float32), none)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(live, range(3)))
    assert [(d.any_tokens, d.any_work) for d in results] == [(False, True)] * 3


def test_a_missing_peer_is_suspected_once_and_only_a_newer_epoch_ends_the_wait() -> None:
    monitors = {r: Monitor() for r in range(2)}
    exchanges = hub_with(monitors, deadline_ms=1.0)
    three, two = make_map(1, [0, 1, 2]), make_map(2, [0, 1])

    def live(rank: int) -> None:
        exchanges[rank].adopt(three)
        with pytest.raises(StepAbandoned):
            run_step(exchanges[rank], three, rank, 0, 2)
        exchanges[rank].adopt(two)
        run_step(exchanges[rank], two, rank, 0, 2)

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(live, rank) for rank in range(2)]
        for monitor in monitors.values():
            assert monitor.suspected.wait(30)
        assert not any(f.done() for f in done)
        for monitor in monitors.values():
            monitor.epoch = Epoch(2)
        for future in done:
            future.result(30)
    for monitor in monitors.values():
        assert monitor.suspicions.count((RankId(2), SuspicionReason.EXCHANGE)) == 1


def test_a_peer_that_moved_on_ends_the_wait_of_one_that_has_not_heard_of_the_epoch() -> None:
    monitors = {r: Monitor() for r in range(2)}
    exchanges = hub_with(monitors, FOREVER_MS)
    three, two = make_map(1, [0, 1, 2]), make_map(2, [0, 1])
    exchanges[0].adopt(three)
    exchanges[1].adopt(two)
    monitors[1].epoch = Epoch(2)

    def move_on() -> None:
        run_step(exchanges[1], two, 1, 0, 2)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(move_on)
        with pytest.raises(StepAbandoned):
            run_step(exchanges[0], three, 0, 0, 2)
        monitors[0].epoch = Epoch(2)
        exchanges[0].adopt(two)
        run_step(exchanges[0], two, 0, 0, 2)
        ahead.result(30)
