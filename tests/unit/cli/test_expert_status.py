"""`starfish status --experts`: what it says of the ranks' counts."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from cli.observe.expert_status import TOP, expert_status, render_experts
from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId
from shared.wire import ExpertCounts

MAP = ExpertMap(
    epoch=Epoch(1),
    num_experts=8,
    members=tuple(Member(rank=RankId(r), incarnation=Incarnation(1)) for r in (0, 1)),
    placement=np.array([[[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]] * 2, dtype=np.int16),
)


def counts(rank: int, chosen: list[list[int]], computed: list[int]) -> ExpertCounts:
    return ExpertCounts(
        nonce=1,
        rank=RankId(rank),
        incarnation=Incarnation(1),
        spread=True,
        num_experts=8,
        chosen=np.array(chosen, dtype="<u4").tobytes(),
        computed=np.array(computed, dtype="<u4").tobytes(),
    )


def test_the_hottest_experts_come_first_with_the_ranks_that_hold_them() -> None:
    one = counts(0, [[8, 0, 0, 0, 0, 0, 0, 0], [1] * 8], [12, 8])
    other = counts(1, [[4, 0, 0, 0, 0, 0, 0, 4], [1] * 8], [4, 8])
    found = expert_status(MAP, {RankId(0): one, RankId(1): other})
    assert found is not None
    assert len(found["top"]) == TOP
    assert found["top"][0] == {"layer": 0, "expert": 0, "load": 6.0, "ranks": [0, 1]}
    assert found["top"][1] == {"layer": 0, "expert": 7, "load": 2.0, "ranks": [1]}
    assert found["rank_loads"] == {"0": 1.25, "1": 0.75}
    assert found["layer_imbalance"] == {"median": 1.25, "worst": 1.5}
    console = Console(record=True, width=120)
    render_experts(found, console)
    assert "0: 1.25, 1: 0.75" in console.export_text()


def test_without_counts_it_says_so() -> None:
    nothing = counts(0, [[0] * 8] * 2, [0, 0])
    assert expert_status(None, {}) is None
    assert expert_status(MAP, {RankId(0): None}) is None
    assert expert_status(MAP, {RankId(0): nothing}) is None
    console = Console(record=True)
    render_experts(None, console)
    assert "no rank has counted" in console.export_text()
