"""Stop strings: the result does not depend on how the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopStrings

SMALL = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = matcher.feed(piece)
        shown += text
        if stopped is not None:
            assert stopped in stops
            return shown, True
    return shown + matcher.flush(), False


def naive(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(stops=STOPS, text=SMALL, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_the_result_does_not_depend_on_how_the_text_is_cut(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(stops, pieces) == naive(stops, text)


@given(stops=STOPS, text=SMALL)
def test_nothing_that_may_become_a_stop_string_is_shown_early(stops: list[str], text: str) -> None:
    matcher = StopStrings(stops)
    shown = ""
    for char in text:
        passed, stopped = matcher.feed(char)
        shown += passed
        if stopped:
            break
    assert naive(stops, text)[0].startswith(shown)


def test_only_what_must_be_is_held_back() -> None:
    matcher = StopStrings(["</end>"])
    assert matcher.feed("grown </e") == ("grown ", None)
    assert matcher.feed("x") == ("</ex", None)


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [(["bc", "abcd"], "abcd", "a"), (["cd", "abcd"], "xabcd", "x"), (["🌊"], "a🌊b", "a")],
)
def test_the_first_complete_one_wins_and_of_several_the_longest(
    stops: list[str], text: str, shown: str
) -> None:
    assert run(stops, [text]) == (shown, True)


@pytest.mark.parametrize("cut", range(9))
def test_a_stop_string_can_be_shown_and_nothing_after_it(cut: int) -> None:
    matcher = StopStrings(["cd", "abcd"], include_stop=True)
    text = "xabcdefg"
    first, stopped = matcher.feed(text[:cut])
    second = "" if stopped else matcher.feed(text[cut:]).text
    assert first + second == "xabcd"
