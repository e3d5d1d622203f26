"""Calls of a chat's history and their results: in the order of the calls, and one a turn where a
template reads no more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.messages import read_messages
from gateway.call_history import in_order_of_calls, one_call_a_turn
from gateway.chat_template import ChatOptions, ChatTemplate
from shared.clock import SystemClock
from tests.support.published_templates import TEMPLATES, TOOLS, assistant, call, result, user

NAMES = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
SHOWING_CALLS = sorted(
    name for name, source in TEMPLATES.items() if "tool_calls" in source and name != "everything"
)
CALLS = [call('{"name": "Vega"}'), call('{"name": "Mira"}', number=2)]
VEGA, MIRA = result("white"), result("crimson", number=2)


def turn(*calls: dict[str, Any], text: str = "", **more: Any) -> dict[str, Any]:
    return assistant(text, tool_calls=list(calls), **more)


def render(name: str, *messages: dict[str, Any]) -> str:
    template = ChatTemplate(TEMPLATES[name], NAMES, SystemClock())
    return template.render(read_messages(messages), ChatOptions(tools=TOOLS))


@pytest.mark.parametrize("name", SHOWING_CALLS)
def test_results_that_come_in_any_order_are_those_of_their_calls(name: str) -> None:
    in_order = render(name, user(), turn(*CALLS), VEGA, MIRA)
    assert render(name, user(), turn(*CALLS), MIRA, VEGA) == in_order
    said = ["Vega", "white", "Mira", "crimson"]
    assert sorted(said, key=in_order.index) in (said, ["Vega", "Mira", "white", "crimson"])


@pytest.mark.parametrize("name", SHOWING_CALLS)
def test_what_an_answer_says_can_be_sent_back(name: str) -> None:
    """Reasoning, a text and a call, as one turn."""
    spoken = turn(CALLS[0], text="I look.", reasoning_content="Which star?")
    shown = render(name, user(), spoken, VEGA)
    assert shown.index("Vega") < shown.index("white")
    bare = render(name, user(), turn(CALLS[0]), VEGA)
    alone = [render(name, user(), turn(CALLS[0], text="I look."), VEGA)]
    alone += [render(name, user(), turn(CALLS[0], reasoning_content="Which star?"), VEGA)]
    for text, one in zip(("I look.", "Which star?"), alone, strict=True):
        assert (text in shown) == (one != bare)


@pytest.mark.parametrize("name", ["harmony", "llama"])
def test_a_template_of_one_call_gets_one_a_turn(name: str) -> None:
    parts = [turn(CALLS[0], text="So."), VEGA, turn(CALLS[1]), MIRA]
    assert render(name, user(), turn(*CALLS, text="So."), VEGA, MIRA) == render(
        name, user(), *parts
    )


@pytest.mark.parametrize(
    "results",
    [
        [MIRA, {**VEGA, "tool_call_id": "other"}],
        [MIRA, {**VEGA, "tool_call_id": None}],
        [MIRA, {"role": "tool", "content": "x"}],
        [{**MIRA, "tool_call_id": ["x"]}],
    ],
)
def test_results_of_unknown_calls_stay_where_they_are(results: list[dict[str, Any]]) -> None:
    messages = [user(), turn(*CALLS), *results, user()]
    assert in_order_of_calls(messages) == messages


def test_only_the_results_of_one_turn_are_ordered() -> None:
    first, second = [turn(*CALLS), VEGA, MIRA], [turn(*reversed(CALLS)), MIRA, VEGA]
    swapped = [*first[:1], MIRA, VEGA, *second[:1], VEGA, MIRA]
    assert in_order_of_calls(swapped) == [*first, *second]
    again = [turn(*CALLS), {**MIRA, "content": "a"}, VEGA, {**MIRA, "content": "b"}]
    assert [m["content"] for m in in_order_of_calls(again)[1:]] == ["white", "a", "b"]


def test_calls_without_ids_have_the_results_of_their_place() -> None:
    bare = [{"function": each["function"]} for each in CALLS]
    messages = [turn(*bare), result("white"), result("crimson", 2), result("green", 3)]
    split = one_call_a_turn(messages)
    assert [m["content"] for m in split] == ["", "white", "", "crimson", "green"]
    assert [m["tool_calls"] for m in split if "tool_calls" in m] == [bare[:1], bare[1:]]


MESSAGES = st.lists(
    st.one_of(
        st.builds(result, st.text(max_size=2), st.integers(1, 3)),
        st.builds(lambda n: turn(*[call("{}", number=i) for i in n]), st.lists(st.integers(1, 3))),
        st.builds(user, st.text(max_size=2)),
    ),
    max_size=8,
)


@given(MESSAGES)
def test_nothing_is_lost(messages: list[dict[str, Any]]) -> None:
    assert sorted(map(repr, in_order_of_calls(messages))) == sorted(map(repr, messages))
    split = one_call_a_turn(messages)
    assert all(len(m.get("tool_calls") or [0]) == 1 for m in split)
    for key in ("content", "tool_calls"):
        kept = [m[key] for m in messages if m.get(key)]
        flat = [c for each in kept for c in each] if key == "tool_calls" else sorted(kept)
        after = [m[key] for m in split if m.get(key)]
        assert (
            [c for each in after for c in each] if key == "tool_calls" else sorted(after)
        ) == flat
