"""Allowed ids, bad words and the budget of reasoning: what they forbid or force, and that a
continuation from any token has the same state."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gpu_worker.engine.token_limits import bitmask_of, has_bit, token_limits
from shared.types import SamplingParams, ThinkingBudget

START, END, NEXT = 40, 41, 42


def budget(tokens: int, *, opened: bool = True, **changes: Any) -> ThinkingBudget:
    fields = {"start_ids": (START,), "end_ids": (END,), "forced_ids": (END, NEXT), **changes}
    return ThinkingBudget(tokens=tokens, opened=opened, **fields)


def allowed_after(generated: list[int], **params: Any) -> set[int] | None:
    limits = token_limits(SamplingParams(**params), generated)
    assert limits is not None
    mask = limits.allowed(None)
    return None if mask is None else {t for t in range(128) if has_bit(mask, t)}


def banned_after(generated: list[int], *words: tuple[int, ...]) -> set[int]:
    limits = token_limits(SamplingParams(bad_words=words), generated)
    assert limits is not None
    return set(limits.banned())


def test_a_request_without_limits_costs_nothing() -> None:
    assert token_limits(SamplingParams(), [1, 2]) is None


@pytest.mark.parametrize("ids", [(0,), (31,), (32,), (0, 63, 64, 127), tuple(range(70))])
def test_a_mask_has_the_bits_of_its_ids(ids: tuple[int, ...]) -> None:
    mask = bitmask_of(ids)
    assert {t for t in range(200) if has_bit(mask, t)} == set(ids)


def test_allowed_ids_are_the_only_ones() -> None:
    assert allowed_after([], allowed_token_ids=(5, 64)) == {5, 64}


def test_a_bad_word_of_one_token_is_always_banned() -> None:
    assert banned_after([], (7,), (8, 9)) == {7}
    assert banned_after([8, 9, 1], (7,)) == {7}


def test_of_longer_bad_words_the_last_token_is_banned_after_the_others() -> None:
    words = ((1, 2), (5, 1, 9), (3, 3, 3))
    assert banned_after([], *words) == set()
    assert banned_after([1], *words) == {2}
    assert banned_after([5, 1], *words) == {2, 9}
    assert banned_after([3, 3], *words) == {3}
    assert banned_after([1, 4], *words) == set()


def test_a_budget_forces_the_end_token_by_token() -> None:
    thinking = budget(2)
    assert allowed_after([7], thinking_budget=thinking) is None
    assert allowed_after([7, 8], thinking_budget=thinking) == {END}
    assert allowed_after([7, 8, END], thinking_budget=thinking) == {NEXT}
    assert allowed_after([7, 8, END, NEXT], thinking_budget=thinking) is None
    assert allowed_after([], thinking_budget=budget(0)) == {END}


def test_an_end_that_comes_by_itself_is_enough() -> None:
    assert allowed_after([7, END], thinking_budget=budget(2)) is None
    assert allowed_after([END, 1, 2, 3, 4], thinking_budget=budget(2)) is None
    several = budget(4, end_ids=(1, 2), forced_ids=(1, 2))
    assert allowed_after([9, 9, 1, 2, 7], thinking_budget=several) is None
    assert allowed_after([9, 9, 9, 1], thinking_budget=several) == {1}


def test_a_budget_counts_from_the_beginning_of_the_reasoning() -> None:
    thinking = budget(1, opened=False)
    assert allowed_after([7, 8, 9], thinking_budget=thinking) is None
    assert allowed_after([7, START], thinking_budget=thinking) is None
    assert allowed_after([7, START, 9], thinking_budget=thinking) == {END}
    assert allowed_after([END, START, 9], thinking_budget=thinking) == {END}


def test_a_grammar_prevails_if_it_does_not_allow_the_end() -> None:
    limits = token_limits(SamplingParams(thinking_budget=budget(0)), [])
    assert limits is not None
    grammar = bitmask_of((3, 4))
    assert limits.allowed(grammar) is grammar
    with_end = limits.allowed(bitmask_of((3, END)))
    assert with_end is not None
    assert [t for t in range(64) if has_bit(with_end, t)] == [END]


def test_the_state_is_a_function_of_the_tokens() -> None:
    """Made at once from all tokens, or token by token: what a rank has that takes over."""
    rng = random.Random(3)
    for _ in range(200):
        params = SamplingParams(
            bad_words=((1, 2), (2, 2, 1), (3,)),
            thinking_budget=budget(rng.randrange(6), opened=rng.random() < 0.5),
        )
        step_by_step = token_limits(params, [])
        assert step_by_step is not None
        tokens: list[int] = []
        for _ in range(12):
            tokens.append(rng.choice([1, 2, START, END, NEXT]))
            step_by_step.add(tokens[-1])
            resumed = token_limits(params, tokens)
            assert resumed is not None
            assert resumed.banned() == step_by_step.banned()
            assert resumed.depends_on_tokens == step_by_step.depends_on_tokens
            left, right = resumed.allowed(None), step_by_step.allowed(None)
            assert (left is None) == (right is None)
            assert left is None or right is None or left.tolist() == right.tolist()
