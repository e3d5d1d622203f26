"""What counts as growth, of a process, of all of a kind, and of the instance."""

from __future__ import annotations

import pytest

from cli.bench.soak.growth import THIRD_MIN, TOLERANCES, Quantity, growth_of
from cli.bench.soak.resource_history import INSTANCE, ResourceHistory
from cli.bench.soak.resources import Life, Sample, Usage

MB = 1 << 20
EVERY_S = 5.0


def series(*values: float) -> list[tuple[float, float]]:
    return [(EVERY_S * number, value) for number, value in enumerate(values)]


def test_what_rises_all_the_time_by_more_than_the_tolerance_has_grown() -> None:
    growth = growth_of("gateway", Quantity.DESCRIPTORS, series(*range(20, 65)))
    assert growth is not None
    assert growth.has_grown
    assert (growth.first, growth.middle, growth.last) == (27, 42, 57)
    assert growth.per_hour == pytest.approx(3600 / EVERY_S)


@pytest.mark.parametrize(
    "values",
    [
        [20] * 45,
        [20 + number % 9 for number in range(45)],
        [20] * 15 + [30] * 30,  # once, as a cache that has been filled
        [20] * 15 + [60] * 15 + [30] * 15,
        [20 + number / 15 for number in range(45)],  # within the tolerance
        list(range(65, 20, -1)),
    ],
)
def test_what_does_not_rise_from_third_to_third_has_not(values: list[float]) -> None:
    growth = growth_of("gateway", Quantity.DESCRIPTORS, series(*values))
    assert growth is not None
    assert not growth.has_grown


def test_the_tolerance_is_a_share_of_what_is_there_or_an_absolute_amount() -> None:
    tolerance = TOLERANCES[Quantity.MEMORY]
    assert tolerance.of(10 * MB) == 8 * MB
    assert tolerance.of(1000 * MB) == 50 * MB


def test_of_too_few_samples_nothing_is_said() -> None:
    assert growth_of("etcd", Quantity.MEMORY, series(*range(3 * THIRD_MIN - 1))) is None
    assert growth_of("etcd", Quantity.MEMORY, series(*range(3 * THIRD_MIN))) is not None


def history(num_samples: int, warm_up_s: float = 60.0) -> ResourceHistory:
    """Rank 1's process is replaced by another one half-way; the gateway leaks a descriptor with
    every sample; each sample finds a verdict more."""
    found = ResourceHistory(0.0, warm_up_s)
    for number in range(num_samples):
        rank = Life(10 if number < num_samples // 2 else 11, 0, "gpu_worker")
        leaking = Life(20, 0, "gateway")
        found.add(
            Sample(
                at=number * EVERY_S,
                is_whole=number % 4 != 0,
                processes={rank: usage(300.0, 40.0), leaking: usage(90.0, 20.0 + number)},
                instance={Quantity.ETCD_KEYS: 30.0, Quantity.ETCD_VERDICTS: float(number)},
            )
        )
    return found


def usage(megabytes: float, descriptors: float) -> Usage:
    return {Quantity.MEMORY: megabytes * MB, Quantity.DESCRIPTORS: descriptors}


def test_growth_is_found_in_a_life_and_in_the_sum() -> None:
    found = history(120)
    grown = [each for each in found.lives() + found.sums() if each.has_grown]
    assert {(each.where, each.quantity) for each in grown} == {
        ("gateway (pid 20)", Quantity.DESCRIPTORS),
        ("all gateway", Quantity.DESCRIPTORS),
    }


def test_each_life_is_judged_after_a_warm_up_of_its_own() -> None:
    lives = {(each.where, each.quantity): each for each in history(200).lives()}
    first = lives["gpu_worker (pid 10)", Quantity.MEMORY]
    second = lives["gpu_worker (pid 11)", Quantity.MEMORY]
    assert first.lasted_s == second.lasted_s == 100 * EVERY_S - EVERY_S - 60.0
    assert history(100).lives() != []
    assert all("gateway" in each.where for each in history(100).lives())  # ranks lived too short


def test_sums_count_processes_and_leave_out_moments_of_faults() -> None:
    sums = {(each.where, each.quantity): each for each in history(120).sums()}
    assert sums["all gpu_worker", Quantity.PROCESSES].last == 1
    assert sums[INSTANCE, Quantity.ETCD_KEYS].last == 30
    assert sums["all gateway", Quantity.DESCRIPTORS].lasted_s == 106 * EVERY_S


def test_verdicts_are_judged_once_the_first_have_expired() -> None:
    def verdicts(num_samples: int) -> list[float]:
        return [
            each.lasted_s
            for each in history(num_samples).sums()
            if each.quantity is Quantity.ETCD_VERDICTS
        ]

    assert verdicts(132) == []
    assert len(verdicts(200)) == 1
