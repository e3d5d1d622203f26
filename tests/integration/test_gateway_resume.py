"""Streams that are resumed over HTTP: after each of its events a client may come back, and gets
exactly the events that would have followed. The gateway keeps nothing of a stream."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tests.integration.test_gateway_tools import MESSAGES, TEMPLATE, TEXT, TOOLS
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import EOS, toy_tokens

STORY = "Ünïcode 🌟🌟 and so on, until it STOPS here; then more"
CALLS = f"{TEXT}<tool_call>\n{{"


class Event(NamedTuple):
    id: str
    data: str

    @property
    def choice(self) -> int:
        """-1: of no choice."""
        choices = json.loads(self.data).get("choices") if self.data.startswith("{") else None
        return int(choices[0]["index"]) if choices else -1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest_asyncio.fixture
async def harness(model: Path) -> AsyncIterator[GatewayHarness]:
    async with running_gateway(model) as running:
        yield running


def say(harness: GatewayHarness, model: Path, text: str) -> None:
    """The ranks answer with this text."""
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    for rank in harness.ranks:
        rank.script = [*ids, EOS]


async def stream(
    harness: GatewayHarness, path: str, body: dict[str, Any], last: str = ""
) -> tuple[int, list[Event]]:
    headers = {"Last-Event-ID": last} if last else {}
    async with harness.http.post(harness.url + path, json=body, headers=headers) as response:
        text = await response.text()
    if response.status != 200:
        return response.status, [Event("", text)]
    events = []
    for part in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in part.split("\n"))
        events.append(Event(lines.get("id", ""), lines["data"]))
    return 200, events


def by_choice(events: list[Event]) -> dict[int, list[str]]:
    """Choices do not wait for each other."""
    found = defaultdict(list)
    for event in events:
        found[event.choice].append(event.data)
    return found


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {}),
    (COMPLETIONS, {"stop": ["STOPS", "🌟 a"], "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"stop": ["here; then more"], "include_stop_str_in_output": True}),
    (COMPLETIONS, {"logprobs": 2, "echo": True, "return_token_ids": True}),
    (COMPLETIONS, {"n": 3, "max_tokens": 9, "prompt": ["a", "bc"], "stop": "so"}),
    (CHAT, {"n": 2, "stream_options": {"include_usage": True}}),
    (CHAT, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    (CHAT, {"logprobs": True, "max_tokens": 12}),
]


@pytest.mark.parametrize(("path", "fields"), TEXTS)
async def test_after_each_event_a_text_goes_on_where_it_was(
    harness: GatewayHarness, model: Path, path: str, fields: dict[str, Any]
) -> None:
    say(harness, model, STORY)
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "once"}
    body = {"model": MODEL, "stream": True, "max_tokens": 200, **prompt, **fields}
    await check_after_each_event(harness, path, body)


@pytest.mark.parametrize("fields", [{}, {"n": 2, "return_token_ids": True, "max_tokens": 40}])
async def test_after_each_event_reasoning_and_calls_go_on_where_they_were(
    harness: GatewayHarness, model: Path, fields: dict[str, Any]
) -> None:
    """Several events tell of one token there: of a mark, and of what is on both sides of it."""
    say(harness, model, CALLS)
    body = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "stream": True, **fields}
    events = await check_after_each_event(harness, CHAT, body)
    assert any("~" in event.id for event in events)


MESSAGES_TOOLS = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}
    for tool in TOOLS
]
RESPONSES_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]
DIALECTS: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/messages", STORY, {"messages": MESSAGES, "max_tokens": 200}),
    ("/v1/messages", STORY, {"messages": MESSAGES, "max_tokens": 200, "stop_sequences": ["🌟 a"]}),
    ("/v1/messages", STORY, {"messages": MESSAGES, "max_tokens": 7}),
    (
        "/v1/messages",
        CALLS,
        {
            "messages": MESSAGES,
            "max_tokens": 200,
            "tools": MESSAGES_TOOLS,
            "thinking": {"type": "enabled"},
        },
    ),
    ("/v1/responses", STORY, {"input": "once"}),
    ("/v1/responses", STORY, {"input": "once", "max_output_tokens": 7}),
    ("/v1/responses", CALLS, {"input": "once", "tools": RESPONSES_TOOLS}),
]


@pytest.mark.parametrize(("path", "text", "fields"), DIALECTS)
async def test_after_each_event_another_apis_answer_goes_on_where_it_was(
    harness: GatewayHarness, model: Path, path: str, text: str, fields: dict[str, Any]
) -> None:
    """Several events tell of one token there: of a block that begins or ends with it, and of the
    end. What has been read to its end has nothing more."""
    say(harness, model, text)
    events = await check_after_each_event(harness, path, {"model": MODEL, "stream": True, **fields})
    kinds = [json.loads(event.data)["type"] for event in events]
    assert kinds[-1] in ("message_stop", "response.completed", "response.incomplete")
    assert len(kinds) > 10
    assert any("~" in event.id for event in events)


async def test_a_resumed_response_is_remembered_where_it_ends(harness: GatewayHarness) -> None:
    body = {"model": MODEL, "input": "x", "stream": True, "max_output_tokens": 4}
    _, events = await stream(harness, "/v1/responses", body)
    response = json.loads(events[-1].data)["response"]
    url = f"{harness.url}/v1/responses/{response['id']}"
    assert (await harness.http.delete(url)).status == 200
    await stream(harness, "/v1/responses", body, last=events[4].id)
    async with harness.http.get(url) as again:
        found = await again.json()
    for each in (found, response):
        each["usage"].pop("input_tokens_details")  # the second time the prompt is cached
    assert found == response


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 4}),
    ],
)
async def test_another_apis_unseeded_stream_names_its_seed(
    harness: GatewayHarness, path: str, fields: dict[str, Any]
) -> None:
    body = {"model": MODEL, "stream": True, **fields}
    _, events = await stream(harness, path, body)
    seeds = [json.loads(event.data).get("seed") for event in events]
    assert seeds[0] is not None
    assert set(seeds[1:]) == {None}
    _, seeded = await stream(harness, path, {**body, "seed": seeds[0]})
    assert "seed" not in json.loads(seeded[0].data)
    used = {submit.sampling.seed for rank in harness.ranks for submit in rank.submits}
    assert used == {seeds[0]}


async def check_after_each_event(
    harness: GatewayHarness, path: str, body: dict[str, Any]
) -> list[Event]:
    """Returns the events of an undisturbed stream."""
    status, events = await stream(harness, path, body)
    assert status == 200
    told = events if path not in (CHAT, COMPLETIONS) else events[:-1]
    assert events[len(told) :] == [Event("", "[DONE]")] * (len(events) - len(told))
    assert all(event.id for event in told)
    assert len({event.id for event in told}) == len(told)
    rests = await asyncio.gather(*(stream(harness, path, body, last=event.id) for event in told))
    for number, (status, rest) in enumerate(rests):
        assert status == 200
        assert by_choice(rest) == by_choice(events[number + 1 :]), f"after {events[number]}"
    return events


async def test_the_seed_of_an_unseeded_stream_is_named_once_and_kept(
    harness: GatewayHarness,
) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 4}
    _, events = await stream(harness, COMPLETIONS, body)
    seeds = [json.loads(event.data).get("seed") for event in events[:-1]]
    assert seeds[0] is not None
    assert seeds[1:] == [None] * 3
    await stream(harness, COMPLETIONS, body, last=events[1].id)
    await stream(harness, COMPLETIONS, body)
    submits = [submit for rank in harness.ranks for submit in rank.submits]
    used = sorted(submit.sampling.seed for submit in submits)
    assert used.count(seeds[0]) == 2
    assert len(set(used)) == 2
    _, seeded = await stream(harness, COMPLETIONS, {**body, "seed": 5})
    assert "seed" not in json.loads(seeded[0].data)


async def test_the_rank_is_told_the_same_key_and_nobody_elses(harness: GatewayHarness) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 4, "n": 2}
    _, events = await stream(harness, COMPLETIONS, body)
    home = [rank for rank in harness.ranks if rank.submits]
    keys = {submit.stream_key for rank in home for submit in rank.submits}
    assert len(keys) == 2
    await stream(harness, COMPLETIONS, body, last=events[3].id)
    assert {submit.stream_key for rank in harness.ranks for submit in rank.submits} == keys
    assert [rank for rank in harness.ranks if rank.submits] == home
    await stream(harness, COMPLETIONS, body)
    assert len({submit.stream_key for rank in harness.ranks for submit in rank.submits}) == 4


async def test_an_id_is_of_one_request_alone(harness: GatewayHarness) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 4}
    _, events = await stream(harness, COMPLETIONS, body)
    last = events[1].id
    forged = [last[:5] + ("A" if last[5] != "A" else "B") + last[6:], last[:28], "x", "é" * 9]
    others = [
        *((COMPLETIONS, body, each) for each in (*forged, last + "-1", last[:29] + "1r1~1.1.1")),
        (COMPLETIONS, {**body, "prompt": "y"}, last),
        (COMPLETIONS, {**body, "n": 2}, last),
        (CHAT, {"model": MODEL, "messages": MESSAGES, "stream": True}, last),
        ("/generate", {"text": "x", "stream": True}, last),
        (COMPLETIONS, {**body, "n": 17}, last),
        (COMPLETIONS, {**body, "stream": False}, last),
    ]
    num_submits = sum(len(rank.submits) for rank in harness.ranks)
    for path, other, sent in others:
        status, (error,) = await stream(harness, path, other, sent)
        assert status == 400, (path, other, sent)
        assert json.loads(error.data)["error"]["param"] == "Last-Event-ID"
    assert sum(len(rank.submits) for rank in harness.ranks) == num_submits


@pytest.mark.parametrize("place", ["999", "3e", "2~0.9.1f", "0~0.0.3", "4~0.1.1", "9e"])
async def test_a_place_that_no_client_can_have_read_ends_all_the_same(
    harness: GatewayHarness, place: str
) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 4}
    body["stream_options"] = {"include_usage": True}
    _, events = await stream(harness, COMPLETIONS, body)
    name = events[0].id.partition(".")[0]
    status, rest = await stream(harness, COMPLETIONS, body, last=f"{name}.{place}")
    assert status == 200
    assert rest[-1].data == "[DONE]"
    assert json.loads(rest[-2].data)["usage"]["completion_tokens"] == 4


async def test_a_stream_with_too_many_choices_has_no_ids(harness: GatewayHarness) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 2, "n": 17}
    _, events = await stream(harness, COMPLETIONS, body)
    assert {event.id for event in events} == {""}


async def test_a_gateway_without_event_ids_resumes_nothing(model: Path) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 2}
    async with running_gateway(model, event_ids=False) as harness:
        _, events = await stream(harness, COMPLETIONS, body)
        assert {event.id for event in events} == {""}
        status, (error,) = await stream(harness, COMPLETIONS, body, last="x.1")
    assert status == 400
    assert "--no-event-ids" in error.data


async def test_a_stream_outlives_a_rank_after_it_was_resumed(harness: GatewayHarness) -> None:
    body = {"model": MODEL, "prompt": [9, 8], "stream": True, "max_tokens": 12}
    body["return_token_ids"] = True
    _, events = await stream(harness, COMPLETIONS, body)
    home = next(rank for rank in harness.ranks if rank.submits)
    await home.kill()
    await harness.publish([rank for rank in harness.ranks if rank is not home])
    _, rest = await stream(harness, COMPLETIONS, body, last=events[5].id)
    ids = [
        token for event in rest[:-1] for token in json.loads(event.data)["choices"][0]["token_ids"]
    ]
    assert ids == toy_tokens([9, 8], 12)[6:]
