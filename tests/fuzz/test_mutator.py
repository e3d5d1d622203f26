"""What makes hostile inputs does not itself run out of memory."""

from __future__ import annotations

import random

from tests.fuzz.mutator import REPEATED_WEIGHT_MAX, Mutator, is_heavier


def test_lists_that_are_repeated_again_and_again_stay_light() -> None:
    """One body of 4 GB in 70,000 came of a list of lists."""
    heaviest = 0
    for seed in range(100):
        mutator = Mutator(random.Random(seed))
        value: object = {"a": [["x" * 1000] * 20] * 20}
        for _ in range(4):
            value = mutator.value(value)
            assert not is_heavier(value, 4 * REPEATED_WEIGHT_MAX)
        heaviest += is_heavier(value, REPEATED_WEIGHT_MAX // 4)
    assert heaviest > 0


def test_texts_and_all_parts_of_a_value_weigh() -> None:
    value = {"ab": [1, "xyz", b"xy", None], "c": (True,)}
    weight = 1 + (3 + 1) + (1 + 4 + 3 + 1) + (2 + 1) + 1
    assert is_heavier(value, weight - 1)
    assert not is_heavier(value, weight)
