"""A rank alone gets of its exchange what a member of a map of one gets of the plain one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from gpu_worker.exchange.interface import Exchange
from gpu_worker.exchange.single_rank import SingleRankExchange
from shared.clock import SystemClock
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId, Step, SuspicionReason
from tests.support.local_exchange import LocalHub

EPOCH = Epoch(1)
NUM_EXPERTS, TOP_K, HIDDEN = 6, 3, 4


class SilentMonitor:
    def newest_epoch(self) -> Epoch:
        return EPOCH

    def beat(self, waiting_for: Sequence[RankId]) -> None: ...

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None: ...


def map_of(slots: Sequence[int]) -> ExpertMap:
    return ExpertMap(
        epoch=EPOCH,
        num_experts=NUM_EXPERTS,
        members=(Member(rank=RankId(0), incarnation=Incarnation(1)),),
        placement=np.array([[slots]], dtype=np.int16),
    )


def plain() -> Exchange:
    hub = LocalHub(1, HIDDEN, TOP_K)
    (member,) = map_of(range(NUM_EXPERTS)).members
    return hub.exchange(member, SilentMonitor(), SystemClock(), 1e9)


def results(exchange: Exchange, num_tokens: int) -> list[np.ndarray]:
    """The input of every pair, its slot, and what comes back to each token."""
    rng = np.random.default_rng(num_tokens)
    x_TH = rng.standard_normal((num_tokens, HIDDEN), dtype=np.float32)
    experts_TK = np.array(
        [rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(num_tokens)], dtype=np.int32
    ).reshape(num_tokens, TOP_K)
    exchange.begin_step(EPOCH, Step(num_tokens), num_tokens=num_tokens, has_work=num_tokens > 0)
    got = exchange.dispatch(0, x_TH, experts_TK)
    inputs_NH = got.x_MH[got.rows_N]
    back_TKH = exchange.combine(0, inputs_NH * (1 + got.slots_N[:, None]).astype(np.float32))
    return [inputs_NH, got.slots_N, np.array([got.any_tokens, got.any_work]), back_TKH]


def test_it_gives_what_the_plain_exchange_gives_step_after_step() -> None:
    alone, among_one = SingleRankExchange(), plain()
    for exchange in (alone, among_one):
        exchange.adopt(map_of(range(NUM_EXPERTS)))
    for num_tokens in (5, 1, 0, 5, 2):
        for ours, theirs in zip(
            results(alone, num_tokens), results(among_one, num_tokens), strict=True
        ):
            assert np.array_equal(ours, theirs)


def test_it_takes_no_map_that_has_experts_elsewhere() -> None:
    with pytest.raises(AssertionError, match="every expert"):
        SingleRankExchange().adopt(map_of([1, 0, 2, 3, 4, 5]))
