"""Tenants that always want something are served in proportion to their weights, whoever comes when;
and whoever comes to a bounded good finds some of it free."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.fair_share import SHARE_OF_FREE, FairShare, fits_share


def serve_least(fair: FairShare, tenants: list[str], size: float) -> str:
    least = min(tenants, key=lambda t: (fair.virtual_time(t), t))
    fair.charge(least, size)
    return least


@settings(max_examples=30)
@given(
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    sizes=st.lists(st.floats(1, 100), min_size=60, max_size=60),
)
def test_backlogged_tenants_are_served_by_weight_up_to_one_request(
    weights: list[float], sizes: list[float]
) -> None:
    fair = FairShare()
    tenants = [str(i) for i in range(len(weights))]
    served = dict.fromkeys(tenants, 0.0)
    for tenant, weight in zip(tenants, weights, strict=True):
        fair.enter(tenant, weight)
    for size in sizes:
        served[serve_least(fair, tenants, size)] += size
    shares = [served[t] / w for t, w in zip(tenants, weights, strict=True)]
    assert max(shares) - min(shares) <= 100 / min(weights) + 1e-6


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=80))
def test_whoever_comes_is_neither_behind_nor_ahead_of_those_who_are_there(
    events: list[tuple[str, int]],
) -> None:
    """A tenant has at most one request; what it takes with 0, it leaves with anything else."""
    fair, active = FairShare(), set[str]()
    for tenant, amount in events:
        if tenant not in active:
            others = [fair.virtual_time(t) for t in active]
            fair.enter(tenant, 1.0)
            active.add(tenant)
            assert fair.virtual_time(tenant) >= min(others, default=0.0)
        elif amount:
            fair.charge(tenant, amount)
        else:
            fair.leave(tenant)
            active.remove(tenant)


def test_idle_time_earns_nothing() -> None:
    fair = FairShare()
    fair.enter("busy", 1.0)
    fair.charge("busy", 1000)
    fair.enter("late", 1.0)
    assert fair.virtual_time("late") == fair.virtual_time("busy")


def test_using_what_nobody_else_wanted_costs_nothing() -> None:
    fair = FairShare()
    fair.enter("alone", 1.0)
    fair.charge("alone", 1000)
    fair.leave("alone")
    fair.enter("other", 1.0)
    fair.enter("alone", 1.0)
    assert fair.virtual_time("alone") == fair.virtual_time("other")


def test_leaving_for_a_moment_wipes_out_no_debt() -> None:
    fair = FairShare()
    for tenant in ("greedy", "other"):
        fair.enter(tenant, 1.0)
    fair.charge("greedy", 50)
    fair.leave("greedy")
    fair.enter("greedy", 1.0)
    assert fair.virtual_time("greedy") == fair.virtual_time("other") + 50


def test_a_charge_is_taken_back_whole() -> None:
    fair = FairShare()
    fair.enter("a", 4.0)
    fair.charge("a", 10)
    fair.charge("a", -10)
    assert fair.virtual_time("a") == 0


def test_tenants_that_have_gone_are_forgotten() -> None:
    fair = FairShare()
    fair.enter("stays", 1.0)
    for number in range(100):
        fair.enter(str(number), 1.0)
        fair.charge(str(number), 1)
        fair.leave(str(number))
        fair.charge("stays", 2)
    fair.leave("stays")
    assert len(fair) == 0


@given(
    wishes=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 60), st.booleans()), min_size=1, max_size=150
    )
)
def test_the_whole_is_never_exceeded_and_something_is_left(
    wishes: list[tuple[int, int, bool]],
) -> None:
    whole, held = 1000, [0] * 5
    for tenant, amount, gives_back in wishes:
        free = whole - sum(held)
        if gives_back:
            held[tenant] = 0
        elif fits_share(used=held[tenant], added=amount, free=free):
            first = held[tenant] == 0
            held[tenant] += amount
            assert first or held[tenant] <= SHARE_OF_FREE * (whole - sum(held))
        assert sum(held) <= whole


def test_one_tenant_leaves_a_ninth_and_two_come_to_equal_parts() -> None:
    whole, held = 9000, {"a": 0, "b": 0}

    def fill(tenant: str) -> None:
        while fits_share(used=held[tenant], added=1, free=whole - sum(held.values())):
            held[tenant] += 1

    fill("a")
    assert held["a"] == 8000
    fill("b")
    assert 800 <= held["b"] <= 1000
    for _ in range(8000):  # requests of a end one by one
        held["a"] -= 1
        fill("b")
        fill("a")
    assert abs(held["a"] - held["b"]) < 100


def test_a_greater_weight_may_hold_more() -> None:
    assert not fits_share(used=800, added=1, free=100)
    assert fits_share(used=800, added=1, free=100, weight=2.0)
