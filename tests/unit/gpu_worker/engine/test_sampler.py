"""Sampling: the right distribution, and a pure function of the row, the seed and the position."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.engine.draw import Draw
from gpu_worker.engine.sampler import NO_TOKEN, nucleus, sample, uniform
from shared.types import SamplingParams


def draw(position: int = 0, banned: tuple[int, ...] = (), **sampling: object) -> Draw:
    return Draw(SamplingParams(**sampling), position, banned)  # type: ignore[arg-type]


def frequencies(logits: list[float], num_draws: int = 4000, **sampling: object) -> list[float]:
    rows = np.tile(np.array(logits, dtype=np.float32), (num_draws, 1))
    ids = sample(rows, [draw(position, **sampling) for position in range(num_draws)])
    return (np.bincount(ids, minlength=len(logits)) / num_draws).tolist()


def noise(rows: int, vocab: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 3


def test_temperature_zero_takes_the_best_and_the_lowest_of_equals() -> None:
    logits = np.array([[1, 5, 5, 2], [9, 0, 9, 9]], dtype=np.float32)
    assert sample(logits, [draw(temperature=0.0)] * 2) == [1, 0]


def test_draws_follow_the_softmax() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    assert frequencies(logits.tolist()) == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_temperature_sharpens() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    expected = np.array([0.5, 0.3, 0.2]) ** 2
    expected /= expected.sum()
    assert frequencies(logits.tolist(), temperature=0.5) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_the_k_best_and_of_equals_the_lowest_ids() -> None:
    shares = frequencies([0.0, 2.0, 2.0, 2.0, 1.0], top_k=2)
    assert shares[1] + shares[2] == 1.0
    assert shares[1] == pytest.approx(0.5, abs=0.03)
    assert frequencies([0.0, 3.0, 1.0], num_draws=50, top_k=1) == [0.0, 1.0, 0.0]


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = np.log([0.1, 0.5, 0.1, 0.3]).tolist()
    assert frequencies(logits, top_p=0.79)[0] == 0.0
    assert frequencies(logits, top_p=0.79) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert frequencies(logits, num_draws=50, top_p=0.0) == [0.0, 1.0, 0.0, 0.0]


def test_a_nucleus_of_equals_takes_the_lowest_ids() -> None:
    logits = np.zeros((1, 3000), dtype=np.float32)
    seen = {sample(logits, [draw(position, top_p=0.9)])[0] for position in range(1500)}
    assert max(seen) <= 2700
    assert max(seen) > 2500


@pytest.mark.parametrize("p", [-1.0, 0.0, 0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_the_nucleus_is_that_of_a_plain_sort(p: float, sharpness: float) -> None:
    for row in noise(10, 200, seed=3) * sharpness:
        weights = np.exp(row.astype(np.float64) - row.max())
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        count = max(1, int((before < p * weights.sum() - 1e-9).sum()))
        assert nucleus(weights, p).tolist() == sorted(order[:count].tolist())


def test_top_k_as_wide_as_the_vocabulary_changes_nothing() -> None:
    logits = noise(40, 50)
    plain = sample(logits, [draw(position) for position in range(40)])
    assert sample(logits, [draw(position, top_k=50) for position in range(40)]) == plain


@pytest.mark.parametrize(
    "sampling",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9, "temperature": 0.7}],
)
def test_a_rows_token_does_not_depend_on_its_neighbours(sampling: dict[str, object]) -> None:
    logits = noise(13, 1021)
    draws = [draw(position, seed=9, **sampling) for position in range(13)]
    together = sample(logits, draws)
    backwards = sample(logits[::-1], draws[::-1])[::-1]
    single = [sample(logits[i : i + 1].copy(), draws[i : i + 1])[0] for i in range(13)]
    assert together == backwards == single


def test_the_draw_is_keyed_by_seed_and_position() -> None:
    logits = np.zeros((1, 1000), dtype=np.float32)
    by_position = {sample(logits, [draw(position, seed=1)])[0] for position in range(20)}
    by_seed = {sample(logits, [draw(3, seed=seed)])[0] for seed in range(20)}
    assert len(by_position) > 15
    assert len(by_seed) > 15
    assert sample(logits, [draw(3, seed=4)]) == sample(logits, [draw(3, seed=4)])


def test_uniform_is_uniform_along_positions_and_along_seeds() -> None:
    for values in (
        [uniform(12345, position) for position in range(20000)],
        [uniform(seed, 17) for seed in range(-10000, 10000)],
    ):
        counts, _ = np.histogram(values, bins=20, range=(0, 1))
        assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared, 19 degrees: p < 0.0002
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_uniform_stays_the_same_across_versions() -> None:
    """Ranks of two versions may serve one session."""
    assert [uniform(0, 0), uniform(0, 1), uniform(7, 0)] == [
        0.6524484863740322,
        0.7012121095215252,
        0.7215081806049702,
    ]


def test_uniform_takes_any_integer_as_seed() -> None:
    for seed in (-1, -(1 << 70), (1 << 64) - 1, 1 << 80):
        assert 0 <= uniform(seed, 5) < 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_ids_are_never_taken(temperature: float) -> None:
    logits = np.array([[0, 9, 8, -5]], dtype=np.float32)
    for position in range(50):
        ids = sample(logits, [draw(position, banned=(1, 99, -3), temperature=temperature)])
        assert ids[0] != 1
    assert logits[0, 1] == 9  # the model's buffer stays as it was


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_best_gives_no_token_and_spares_the_others(
    value: float, temperature: float
) -> None:
    logits = np.array([[value] * 3, [0, 50, 0]], dtype=np.float32)
    assert sample(logits, [draw(temperature=temperature)] * 2) == [NO_TOKEN, 1]


def test_banning_everything_gives_no_token() -> None:
    assert sample(np.zeros((1, 2), dtype=np.float32), [draw(banned=(0, 1))]) == [NO_TOKEN]


def test_no_rows_give_no_tokens() -> None:
    assert sample(np.zeros((0, 5), dtype=np.float32), []) == []
