"""The calls in a chat's history and their results, in the order and number in which templates read
them: many know no ids, and take the n-th result for that of the n-th call. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

Message = dict[str, Any]


def in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """The same messages. Results that follow the turn of their calls come in the order of the
    calls: agents that call in parallel send each when it is there. If the id of one is not that of
    a call, all of them stay where they are."""
    ordered: list[Message] = []
    for message, results in _turns(messages):
        numbers = _numbers(message)
        owners = [numbers.get(_call_id(result), -1) for result in results]
        if -1 not in owners:
            results = [results[i] for i in sorted(range(len(results)), key=owners.__getitem__)]
        ordered += [message, *results]
    return ordered


def one_call_a_turn(messages: Sequence[Message]) -> list[Message]:
    """For templates that read one call of a turn: each further one begins a turn of its own, and
    each is followed by its results. Text and reasoning stay with the first."""
    split: list[Message] = []
    for message, results in _turns(messages):
        calls = message.get("tool_calls") or [None]
        if len(calls) < 2:
            split += [message, *results]
            continue
        numbers = _numbers(message)
        results_of: list[list[Message]] = [[] for _ in calls]
        for position, result in enumerate(results):
            by_position = min(position, len(calls) - 1)
            results_of[numbers.get(_call_id(result), by_position)].append(result)
        for number, call in enumerate(calls):
            turn = message if number == 0 else {"role": message["role"], "content": ""}
            split += [{**turn, "tool_calls": [call]}, *results_of[number]]
    return split


def _turns(messages: Sequence[Message]) -> Iterator[tuple[Message, list[Message]]]:
    """Each message, with those after it that are results of its calls."""
    index = 0
    while index < len(messages):
        message, results = messages[index], []
        if message.get("tool_calls"):
            results = list(takewhile(_is_result, messages[index + 1 :]))
        yield message, results
        index += 1 + len(results)


def _numbers(message: Mapping[str, Any]) -> dict[str, int]:
    """Id of a call → its number in the turn. Empty, unless each has an id of its own."""
    calls = message.get("tool_calls") or ()
    numbers = {
        call["id"]: number for number, call in enumerate(calls) if isinstance(call.get("id"), str)
    }
    return numbers if len(numbers) == len(calls) else {}


def _is_result(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "tool"


def _call_id(result: Mapping[str, Any]) -> str:
    call_id = result.get("tool_call_id")
    return call_id if isinstance(call_id, str) else ""
