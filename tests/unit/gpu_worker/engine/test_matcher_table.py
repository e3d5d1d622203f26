"""Whatever happens to the child, a matcher's mask is that after its last token, or it is not known
yet."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.engine.matcher_table import DEATHS_MAX, MatcherState, MatcherTable
from shared.grammars.messages import Advance, Close, Mask, Open, Refused, Request


class Child:
    """Answers when the test says so. Its mask after some tokens is a number made of them."""

    def __init__(self, requests: list[Request]) -> None:
        self.waiting: list[Request] = []
        self.emitted: dict[int, list[int]] = {}
        self.take(requests)

    def take(self, requests: list[Request]) -> None:
        self.waiting += requests

    def answer(self) -> Mask | Refused | None:
        """To the next request that compiling or stepping has come to."""
        request = self.waiting.pop(0)
        match request:
            case Open(job=job, matcher=matcher, emitted=emitted):
                self.emitted[matcher] = list(emitted)
                return Mask(job=job, bits=mask_after(emitted))
            case Advance(job=job, matcher=matcher, token=token):
                assert matcher in self.emitted, "it is not there: it would be refused"
                self.emitted[matcher].append(token)
                return Mask(job=job, bits=mask_after(self.emitted[matcher]))
            case Close(matcher=matcher):
                self.emitted.pop(matcher, None)
        return None


def mask_after(emitted: list[int]) -> bytes:
    return np.array([*emitted, -1], dtype=np.int32).tobytes()


def is_right(matcher: MatcherState) -> bool:
    return matcher.allowed is None or matcher.allowed.tobytes() == mask_after(matcher.emitted)


@settings(max_examples=200, deadline=None)
@given(events=st.lists(st.sampled_from(["answer", "advance", "die", "open", "close"]), max_size=40))
def test_a_mask_is_that_after_the_last_token_or_unknown(events: list[str]) -> None:
    table = MatcherTable()
    first, requests = table.open("g", [5])
    matchers = [first]
    child = Child(requests)
    for number, event in enumerate(events):
        match event:
            case "answer":
                if child.waiting and isinstance(reply := child.answer(), Mask):
                    child.take(table.on_mask(reply))
            case "advance":
                known = [m for m in matchers if m.allowed is not None]
                if known:
                    child.take(table.advance(known[number % len(known)], number))
            case "die":
                child = Child(table.on_restart(None, overran=False))
            case "open":
                opened, requests = table.open("g", [number])
                matchers.append(opened)
                child.take(requests)
            case "close":
                closed = matchers.pop() if len(matchers) > 1 else None
                child.take([] if closed is None else table.close(closed))
        assert all(map(is_right, matchers))
        assert all(m.error is None for m in matchers)
    while child.waiting:
        if isinstance(reply := child.answer(), Mask):
            child.take(table.on_mask(reply))
    assert all(m.allowed is not None and is_right(m) for m in matchers)
    assert len(table.matchers) == len(matchers)


def test_an_answer_of_a_child_before_changes_nothing() -> None:
    table = MatcherTable()
    matcher, (opened,) = table.open("g", [])
    assert isinstance(opened, Open)
    table.on_restart(None, overran=False)
    table.on_mask(Mask(job=opened.job, bits=mask_after([])))
    assert matcher.allowed is None
    table.on_refused(Refused(job=opened.job, error="closed"))
    assert matcher.error is None


def test_the_one_that_overran_fails_and_is_not_opened_again() -> None:
    table = MatcherTable()
    guilty, (opened,) = table.open("g", [])
    innocent, _ = table.open("h", [])
    assert isinstance(opened, Open)
    requests = table.on_restart(opened.job, overran=True)
    assert guilty.error is not None
    assert [r.matcher for r in requests if isinstance(r, Open)] == [innocent.id]
    assert innocent.error is None


def test_one_that_ran_when_children_died_in_a_row_fails() -> None:
    table = MatcherTable()
    matcher, requests = table.open("g", [])
    for _ in range(DEATHS_MAX):
        assert matcher.error is None
        (opened,) = requests
        assert isinstance(opened, Open)
        requests = table.on_restart(opened.job, overran=False)
    assert matcher.error is not None
    assert requests == []


def test_a_mask_between_two_deaths_starts_the_count_anew() -> None:
    table = MatcherTable()
    matcher, requests = table.open("g", [])
    for _ in range(DEATHS_MAX * 2):
        (opened,) = requests
        assert isinstance(opened, Open)
        (again,) = table.on_restart(opened.job, overran=False)
        assert isinstance(again, Open)
        table.on_mask(Mask(job=again.job, bits=mask_after([])))
        requests = table.on_restart(None, overran=False)
    assert matcher.error is None


def test_a_refusal_closes_it_in_the_child() -> None:
    table = MatcherTable()
    matcher, (opened,) = table.open("g", [])
    assert isinstance(opened, Open)
    assert table.on_refused(Refused(job=opened.job, error="x")) == [Close(matcher=matcher.id)]
    assert matcher.error is not None
    assert "x" in matcher.error
    assert table.close(matcher) == []


def test_without_a_child_all_fail() -> None:
    table = MatcherTable()
    matcher, _ = table.open("g", [])
    table.on_unavailable("none")
    assert matcher.error is not None
    assert table.matchers == []
