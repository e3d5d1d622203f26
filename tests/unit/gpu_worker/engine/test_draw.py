"""Penalties, bias, bans, masks and min-p: against the formulas written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_worker.engine.draw import (
    Draw,
    LogitBias,
    TokenCounts,
    count_tokens,
    edited_logits,
    logit_bias_of,
)
from gpu_worker.engine.sampler import NO_TOKEN, sample
from shared.types import SamplingParams

VOCAB = 70
PROMPT = (3, 3, 9, 41)
GENERATED = (9, 5, 5, 5, 60)


def noise(rows: int = 1, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3


def draw(position: int = 9, *, banned: tuple[int, ...] = (), **params: object) -> Draw:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    counts, bias = count_tokens(sampling, PROMPT, GENERATED), logit_bias_of(sampling)
    return Draw(sampling, position, banned, counts, bias=bias)


def mask_of(ids: set[int], num_words: int = 3) -> NDArray[np.int32]:
    words = [sum(1 << bit for bit in range(32) if 32 * w + bit in ids) for w in range(num_words)]
    return np.array(words, dtype=np.uint32).view(np.int32)


def naive(logits: NDArray[np.float32], sampling: SamplingParams) -> list[float]:
    result = []
    for token, logit in enumerate(logits.tolist()):
        x = logit + dict(sampling.logit_bias).get(token, 0.0)
        if token in PROMPT or token in GENERATED:
            factor = sampling.repetition_penalty
            x = x / factor if x > 0 else x * factor
        count = GENERATED.count(token)
        x -= sampling.frequency_penalty * count
        x -= sampling.presence_penalty * (1 if count else 0)
        result.append(x)
    return result


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.4},
        {"presence_penalty": 1.3},
        {"frequency_penalty": -0.8},
        {"logit_bias": ((5, -100.0), (69, 2.5))},
        {
            "repetition_penalty": 1.2,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.25,
            "logit_bias": ((3, 4.0), (0, -1.5)),
        },
    ],
)
def test_edits_are_the_formulas(params: dict[str, object]) -> None:
    logits = noise()[0]
    how = draw(**params)
    assert edited_logits(logits, how) == pytest.approx(naive(logits, how.sampling), rel=1e-12)


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 2.0}, {"logit_bias": ((7, 100.0),)}, {"repetition_penalty": 9.0}],
)
def test_the_greedy_choice_is_that_of_the_edited_logits(params: dict[str, object]) -> None:
    for logits in noise(20, seed=4):
        how = draw(temperature=0.0, **params)
        assert sample(logits[None], [how]) == [int(np.argmax(naive(logits, how.sampling)))]


def test_counts_kept_token_by_token_are_those_of_a_continuation() -> None:
    kept = TokenCounts(PROMPT, ())
    for token in GENERATED:
        kept.add(token)
    anew = TokenCounts(PROMPT, GENERATED)
    pairs = [dict(zip(*(a.tolist() for a in c.arrays()), strict=True)) for c in (kept, anew)]
    assert pairs[0] == pairs[1] == {3: 0, 9: 1, 41: 0, 5: 3, 60: 1}


def test_only_the_repetition_penalty_counts_the_prompt() -> None:
    counts = count_tokens(SamplingParams(frequency_penalty=0.1), PROMPT, GENERATED)
    assert counts is not None
    assert set(counts.arrays()[0].tolist()) == set(GENERATED)
    assert count_tokens(SamplingParams(), PROMPT, GENERATED) is None


def test_a_ban_beats_any_bias() -> None:
    how = draw(temperature=0.0, banned=(7,), logit_bias=((7, 100.0),))
    assert sample(noise(), [how]) != [7]


def test_only_what_a_mask_allows_is_drawn() -> None:
    allowed = {2, 31, 32, 63, 64, 69}
    logits = noise(200)
    draws = [draw(n, temperature=2.0)._replace(allowed=mask_of(allowed)) for n in range(200)]
    assert set(sample(logits, draws)) == allowed
    greedy = [draw(temperature=0.0)._replace(allowed=mask_of(allowed))] * 200
    best = [max(allowed, key=lambda token, row=row: row[token]) for row in logits]
    assert sample(logits, greedy) == best


def test_a_mask_that_is_shorter_than_the_vocabulary_allows_nothing_beyond() -> None:
    how = draw(temperature=0.0, logit_bias=((69, 100.0),))
    assert sample(noise(), [how]) == [69]
    assert sample(noise(), [how._replace(allowed=mask_of(set(range(64)), 2))])[0] < 64


def test_a_mask_that_allows_nothing_draws_nothing() -> None:
    assert sample(noise(), [draw()._replace(allowed=mask_of(set()))]) == [NO_TOKEN]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(temperature: float) -> None:
    logits = noise(seed=8)[0] / 3
    share = [math.exp(float(x - logits.max()) / temperature) for x in logits]
    likely = {token for token, each in enumerate(share) if each >= 0.1}
    rows = np.tile(logits, (3000, 1))
    draws = [draw(n, min_p=0.1, temperature=temperature) for n in range(3000)]
    assert set(sample(rows, draws)) == likely
    assert 1 < len(likely) < VOCAB


def test_min_p_of_one_is_greedy() -> None:
    rows = noise(50)
    draws = [draw(n, min_p=1.0) for n in range(50)]
    assert sample(rows, draws) == rows.argmax(axis=1).tolist()


def test_bans_yield_where_a_mask_allows_nothing_else() -> None:
    (row,) = noise()
    sampling = SamplingParams(temperature=0.0)
    both = Draw(sampling, 9, (4, 8), allowed=mask_of({4, 8}))
    assert sample(row[None], [both]) == [4 if row[4] > row[8] else 8]
    one = Draw(sampling, 9, (4,), allowed=mask_of({4, 8}))
    assert sample(row[None], [one]) == [8]


def test_counts_are_those_of_each_token_however_they_came() -> None:
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, 40, size=30).tolist()
    generated = rng.integers(0, 90, size=200).tolist()
    for at_once in (0, 1, 77, 200):
        counts = TokenCounts(prompt, generated[:at_once])
        for token in generated[at_once:]:
            counts.add(token)
        ids, numbers = counts.arrays()
        found = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
        assert len(found) == len(ids), "each once: a penalty counts once"
        assert found == {t: generated.count(t) for t in {*prompt, *generated}}


def test_a_bias_that_a_message_names_twice_counts_twice_and_strange_ids_do_nothing() -> None:
    x_V = np.zeros(4)
    LogitBias(((1, 0.5), (1, 0.25), (-1, 9.0), (4, 9.0), (1 << 40, 9.0))).add_to(x_V)
    assert x_V.tolist() == [0.0, 0.75, 0.0, 0.0]
