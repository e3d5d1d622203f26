"""Bounds of a request that hold before anything is rendered, scored or shaped."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api.bodies import CompletionBody
from gateway.api.messages import (
    MESSAGE_PARTS_MAX,
    MESSAGES_BYTES_MAX,
    MESSAGES_MAX,
    read_messages,
)
from gateway.api.requests import (
    ChoiceSize,
    RequestOptions,
    check_num_logprobs,
    read_options,
)
from gateway.served_model import ModelLimits
from shared.errors import RequestError

LIMITS = ModelLimits(vocab_size=4096, context_tokens_max=8192)


def options(**fields: Any) -> RequestOptions:
    return read_options(CompletionBody(prompt="x", **fields), LIMITS)


def message(content: str | list[dict[str, str]]) -> dict[str, Any]:
    return {"role": "user", "content": content}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [message("")] * (MESSAGES_MAX + 1),
        [message([part("")] * (MESSAGE_PARTS_MAX + 1))],
        [{**message(""), "tool_calls": [{}] * MESSAGE_PARTS_MAX}, {**message([part("")])}],
        [message("x" * (MESSAGES_BYTES_MAX // 2))] * 3,
        [message([part("\u2126" * (MESSAGES_BYTES_MAX // 2))])],
    ],
)
def test_a_chat_is_bounded_in_messages_parts_and_bytes(messages: list[Any]) -> None:
    with pytest.raises(RequestError) as refused:
        read_messages(messages)
    assert refused.value.param == "messages"


def test_a_long_chat_is_read() -> None:
    assert len(read_messages([message("x" * 1000)] * MESSAGES_MAX)) == MESSAGES_MAX


def test_the_prompt_is_scored_for_its_first_choice_alone_unless_it_is_echoed() -> None:
    def scored(**fields: Any) -> list[int | None]:
        asked = options(n=3, **fields)
        return [asked.sampling_for(5, LIMITS, choice).prompt_logprobs for choice in range(3)]

    assert scored(prompt_logprobs=4) == [4, None, None]
    assert scored(prompt_logprobs=4, echo=True) == [4, 4, 4]
    assert scored(logprobs=2, echo=True) == [2, 2, 2]


@pytest.mark.parametrize(
    ("fields", "choices", "number"),
    [
        ({"prompt_logprobs": 20}, [(2000, 1)], 42_000),
        ({"prompt_logprobs": 20, "n": 4}, [(2000, 1)] * 256, 10_752_000),
        ({"logprobs": 4}, [(2000, 100)] * 2, 1000),
        ({"logprobs": 4, "echo": True}, [(2000, 100)], 10_500),
        ({"logprobs": 4, "echo": True, "stream": True}, [(2000, 100)], 10_000),
    ],
)
def test_log_probabilities_are_bounded_in_tokens_times_likeliest_times_choices(
    fields: dict[str, Any], choices: list[tuple[int, int]], number: int
) -> None:
    sizes = [ChoiceSize(*each) for each in choices]
    check_num_logprobs(options(**fields), sizes, number)
    with pytest.raises(RequestError, match=str(number)) as refused:
        check_num_logprobs(options(**fields), sizes, number - 1)
    assert refused.value.param in ("prompt_logprobs", "logprobs")


def test_what_shows_none_or_streams_is_not_bounded() -> None:
    check_num_logprobs(options(), [ChoiceSize(10_000, 10_000)], 1)
    check_num_logprobs(options(logprobs=20, stream=True), [ChoiceSize(10_000, 10_000)], 1)


def test_a_forced_call_has_no_stops() -> None:
    plain = options(stop=["}", "x"], stop_token_ids=[5])
    forced = plain.guided_by("g", forces_call=True)
    assert (forced.stops, forced.sampling.stop_token_ids) == ((), ())
    kept = plain.guided_by("g")
    assert (kept.stops, kept.sampling.stop_token_ids) == (("}", "x"), (5,))
    assert forced.sampling.grammar == kept.sampling.grammar == "g"
