"""Shares of a host's CPUs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node_agent.cpu_share import share_cpus
from shared.types import RankId

CPUS = st.sets(st.integers(0, 200), min_size=1, max_size=64).map(sorted)
RANKS = st.integers(1, 16).map(lambda n: [RankId(r) for r in range(n)])


@given(CPUS, RANKS)
def test_every_rank_gets_cpus_of_the_host(cpus: list[int], ranks: list[RankId]) -> None:
    shares = share_cpus(cpus, ranks)
    assert list(shares) == ranks
    assert all(share and share <= set(cpus) for share in shares.values())


@given(CPUS, RANKS)
def test_the_load_of_two_cpus_differs_by_one_rank_at_most(
    cpus: list[int], ranks: list[RankId]
) -> None:
    shares = share_cpus(cpus, ranks)
    load = [sum(cpu in share for share in shares.values()) for cpu in cpus]
    assert max(load) - min(load) <= 1


def test_neighbours_stay_together() -> None:
    shares = share_cpus(range(8), [RankId(0), RankId(1)])
    assert shares == {0: frozenset({0, 1, 2, 3}), 1: frozenset({4, 5, 6, 7})}
