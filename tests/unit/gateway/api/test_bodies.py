"""Request bodies: what is ignored, what is rejected, and which field an error names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.bodies import ChatBody, CompletionBody, decode_body
from gateway.api.requests import (
    COMPLETION_TOKENS_DEFAULT,
    RequestOptions,
    read_options,
    read_prompts,
)
from gateway.served_model import ModelLimits
from shared.errors import RequestError

LIMITS = ModelLimits(vocab_size=100, context_tokens_max=50)
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def completion(**fields: Any) -> CompletionBody:
    return decode_body(json.dumps({"prompt": "x", **fields}).encode(), CompletionBody)


def chat(**fields: Any) -> ChatBody:
    return decode_body(json.dumps({**CHAT, **fields}).encode(), ChatBody)


def options(**fields: Any) -> RequestOptions:
    return read_options(completion(**fields), LIMITS)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "store": True, "metadata": {"a": 1}, "service_tier": "auto", "new": [1]},
        {"n": 1, "best_of": 1, "logprobs": None, "echo": False, "suffix": None},
        {"logit_bias": {}, "response_format": {"type": "text"}, "skip_special_tokens": True},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"temperature": None, "top_p": None, "max_tokens": None, "stop": None, "seed": None},
    ],
)
def test_what_changes_nothing_is_tolerated(fields: dict[str, Any]) -> None:
    read_options(completion(**fields), LIMITS)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("suffix", "end"),
        ("use_beam_search", True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(RequestError, match="not supported") as caught:
        completion(**{param: value})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_chats_refuse_their_own_features(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_chats_cannot_ask_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_options(chat(**fields), LIMITS)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "9"),
        ("max_tokens", 1.5),
        ("min_tokens", -1),
        ("min_tokens", COMPLETION_TOKENS_DEFAULT + 1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("top_k", -2),
        ("seed", 2**64),
        ("stop", ["a"] * 17),
        ("stop", [""]),
        ("stop", [3]),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("stream_options", {"include_usage": True}),
        ("ignore_eos", "yes"),
        ("n", 0),
        ("n", 129),
        ("n", "two"),
        ("best_of", 2),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("echo", "yes"),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 101),
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("logit_bias", {"100": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", [1]),
    ],
)
def test_impossible_values_are_refused_by_name(param: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        options(**{param: value})
    assert caught.value.param == param


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b"nul", b'{"a":}'])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError):
        decode_body(raw, CompletionBody)


@given(raw=st.binary(max_size=60))
def test_no_bytes_crash_the_decoder(raw: bytes) -> None:
    with pytest.raises(RequestError):
        decode_body(raw, ChatBody)


def test_sampling_is_taken_as_it_was_asked_for() -> None:
    asked = options(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        seed=-1,
        max_tokens=9,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=[7, 5, 7],
        stop="end",
        stream=True,
        return_token_ids=True,
    )
    sampling = asked.sampling_for(10, LIMITS)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (2**64 - 1, 9, 3)
    assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (5, 7))
    assert (asked.stops, asked.stream, asked.return_token_ids) == (("end",), True, True)


def test_penalties_bias_and_log_probabilities_are_taken_as_asked_for() -> None:
    asked = options(
        min_p=0.1,
        presence_penalty=-2,
        frequency_penalty=1.5,
        repetition_penalty=1.2,
        logit_bias={"7": -100, "3": 2.5},
        logprobs=4,
    )
    sampling = asked.sampling
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 1.5)
    assert sampling.logit_bias == ((3, 2.5), (7, -100.0))
    assert (sampling.logprobs, sampling.prompt_logprobs) == (4, None)
    chatted = read_options(chat(logprobs=True, top_logprobs=2), LIMITS).sampling
    assert (chatted.logprobs, chatted.prompt_logprobs) == (2, None)
    assert read_options(chat(logprobs=True), LIMITS).sampling.logprobs == 0


def test_the_prompt_is_scored_as_widely_as_anything_needs() -> None:
    assert options(echo=True, logprobs=3).sampling.prompt_logprobs == 3
    assert options(echo=True, logprobs=3, prompt_logprobs=5).sampling.prompt_logprobs == 5
    assert options(prompt_logprobs=0, max_tokens=0).sampling_for(50, LIMITS).max_tokens == 0
    assert options(echo=True).sampling.prompt_logprobs is None


def test_choices_draw_with_seeds_of_their_own_and_the_first_as_if_alone() -> None:
    asked = options(n=50, best_of=50, seed=11)
    seeds = [asked.sampling_for(3, LIMITS, choice).seed for choice in range(50)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 50
    assert (
        seeds[1] == 7836488980342811034
    )  # the same seed must give the same answer in every release


def test_without_a_seed_each_request_draws_its_own() -> None:
    assert len({options().sampling.seed for _ in range(20)}) == 20


def test_completions_default_to_sixteen_tokens_and_chats_to_the_context() -> None:
    assert options().sampling_for(10, LIMITS).max_tokens == COMPLETION_TOKENS_DEFAULT
    assert read_options(chat(), LIMITS).sampling_for(10, LIMITS).max_tokens == 40


def test_max_completion_tokens_wins() -> None:
    asked = read_options(chat(max_tokens=3, max_completion_tokens=5), LIMITS)
    assert asked.sampling_for(10, LIMITS).max_tokens == 5


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(50, None), (60, None), (45, 6)])
def test_what_does_not_fit_the_context_is_refused(num_prompt: int, max_tokens: int | None) -> None:
    asked = read_options(chat(max_tokens=max_tokens), LIMITS)
    with pytest.raises(RequestError) as caught:
        asked.sampling_for(num_prompt, LIMITS)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a", ["a"]),
        ([1, 2], [(1, 2)]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_prompts_are_texts_or_token_ids_or_lists_of_them(prompt: Any, read: list[Any]) -> None:
    assert read_prompts(completion(prompt=prompt), 100) == read


@pytest.mark.parametrize("prompt", [[], [100], [-1], [1, "a"], [[]], [1.5], [True], ["a"] * 65])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        read_prompts(completion(prompt=prompt), 100)
    assert caught.value.param == "prompt"
