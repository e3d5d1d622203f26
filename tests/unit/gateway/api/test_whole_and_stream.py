"""A whole answer is what the events of its stream add up to: for chats, responses and messages,
whatever the model writes and wherever it is cut off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.answer_reader import AnswerReader, CallIds
from gateway.api.anthropic.answer import MessagesAnswer, read_arguments
from gateway.api.dialect import Dialect, Ending
from gateway.api.openai_responses.answer import ResponseAnswer
from gateway.api.openai_responses.bodies import ResponsesBody
from gateway.api.responses import Usage
from gateway.api.token_offsets import TokenOffsets
from gateway.detokenizer import TokenBytes
from gateway.parsers.formats import REASONING_FORMATS, TOOL_FORMATS, output_parser
from shared.types import FinishReason

USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=7)
NO_TOKENS = TokenBytes({}, frozenset())

PLAIN = st.text("ab <\n", max_size=5)
CALL = '{"name": "f", "arguments": {"x": [1, "}"]}}'
FORMATS: dict[tuple[str, str], st.SearchStrategy[str]] = {
    ("hermes", "qwen3"): st.tuples(
        st.sampled_from(["", "<think>", "<think>hm</think>", "hm</think>"]),
        st.lists(
            st.one_of(
                PLAIN,
                st.sampled_from([f"<tool_call>{CALL}</tool_call>", f"<tool_call>{CALL[:-2]}"]),
            ),
            max_size=5,
        ).map("".join),
    ).map("".join),
    ("openai", "openai_gptoss"): st.lists(
        st.one_of(
            PLAIN.map(lambda text: f"<|channel|>analysis<|message|>{text}<|end|><|start|>"),
            PLAIN.map(lambda text: f"<|channel|>final<|message|>{text}<|end|>"),
            PLAIN,
            st.sampled_from(["assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>"]),
        ),
        max_size=5,
    ).map("".join),
}


@st.composite
def answers(draw: st.DrawFn) -> tuple[tuple[str, str], list[str], str, bool]:
    """The formats, pieces of text, why it ended, and whether the reasoning is shown."""
    formats = draw(st.sampled_from(sorted(FORMATS)))
    text = draw(FORMATS[formats])
    reason = draw(st.sampled_from(["stop", "length"]))
    if reason == "length":
        text = text[: draw(st.integers(0, len(text)))]
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return formats, pieces, reason, draw(st.booleans())


def reader_of(formats: tuple[str, str], *, shows_reasoning: bool) -> AnswerReader:
    parser = output_parser(
        tools=TOOL_FORMATS[formats[0]],
        reasoning=REASONING_FORMATS[formats[1]],
        schemas={},
        opened=None,
        calls_max=None,
    )
    assert parser is not None
    ids = CallIds(answer="a", choice=0, form=None)
    offsets = TokenOffsets(NO_TOKENS, follows=())
    return AnswerReader(parser, offsets, ids, shows_reasoning=shows_reasoning)


def streamed(reader: AnswerReader, pieces: list[str], reason: str) -> list[list[dict[str, Any]]]:
    deltas = [reader.feed(piece, (), None) for piece in pieces]
    return [*deltas, reader.feed("", (), FinishReason(reason))]


def written(answer: Dialect, deltas: Iterable[list[dict[str, Any]]], end: Ending) -> list[Any]:
    blocks = answer.begin(USAGE)
    for each in deltas:
        blocks += answer.deltas(each)
    lines = b"".join([*blocks, *answer.end(end)]).splitlines()
    return [msgspec.json.decode(line[6:]) for line in lines if line.startswith(b"data: ")]


def response_answer() -> ResponseAnswer:
    body = msgspec.convert({"input": "hi"}, ResponsesBody)
    return ResponseAnswer(id="chatcmpl-1", created=5, model="m", body=body)


def message_of(deltas: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    """As a client of chats adds them up."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for delta in (delta for each in deltas for delta in each):
        message["content"] += delta.get("content", "")
        message["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                message["calls"].append([call["id"], call["function"]["name"], ""])
            message["calls"][call["index"]][2] += call["function"]["arguments"]
    return message


def output_of(events: list[Any]) -> list[Any]:
    """The items of a response's stream, made of its pieces and then as they were done."""
    items: list[Any] = []
    texts: list[str] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            texts.append("")
        elif event["type"].endswith(".delta"):
            texts[event["output_index"]] += event["delta"]
        elif event["type"] == "response.output_item.done":
            item = event["item"]
            parts = item.get("content", [])
            shown = "".join(part["text"] for part in parts) or item.get("arguments", "")
            assert shown == texts[event["output_index"]]
            items.append(item)
    return items


def content_of(events: list[Any]) -> list[Any]:
    """The blocks of a message's stream."""
    blocks: list[Any] = []
    arguments: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            for key, piece in event["delta"].items():
                if key == "partial_json":
                    arguments[event["index"]] = arguments.get(event["index"], "") + piece
                elif key != "type":
                    blocks[event["index"]][key] += piece
    for index, text in arguments.items():
        blocks[index]["input"] = read_arguments(text)
    return blocks


@given(answers())
def test_a_whole_answer_is_what_its_stream_adds_up_to(
    case: tuple[tuple[str, str], list[str], str, bool],
) -> None:
    formats, pieces, reason, shows_reasoning = case
    reader = reader_of(formats, shows_reasoning=shows_reasoning)
    deltas = streamed(reader, pieces, reason)
    end = Ending(
        reason=reader.finish_reason(FinishReason(reason), None), stop_string=None, usage=USAGE
    )

    message = reader.message()
    calls = [[call["id"], *call["function"].values()] for call in message.get("tool_calls", ())]
    assert message_of(deltas) == {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "calls": calls,
    }

    events = written(response_answer(), deltas, end)
    response = msgspec.json.decode(response_answer().whole(reader.whole(), end))
    assert events[-1]["response"] == response
    assert output_of(events) == response["output"]
    assert [item["status"] for item in response["output"][:-1]] == ["completed"] * (
        len(response["output"]) - 1
    )

    events = written(MessagesAnswer(id="chatcmpl-1", model="m"), deltas, end)
    whole = msgspec.json.decode(
        MessagesAnswer(id="chatcmpl-1", model="m").whole(reader.whole(), end)
    )
    assert content_of(events) == whole["content"]
    assert events[-2]["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}


def test_what_follows_a_call_stays_behind_it() -> None:
    reader = reader_of(("hermes", "qwen3"), shows_reasoning=True)
    text = f"<think>hm</think>a<tool_call>{CALL}</tool_call>b"
    streamed(reader, [text], "length")
    end = Ending(reason="length", stop_string=None, usage=USAGE)
    response = msgspec.json.decode(response_answer().whole(reader.whole(), end))
    assert [(item["type"], item["status"]) for item in response["output"]] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("message", "incomplete"),
    ]
    answer = MessagesAnswer(id="chatcmpl-1", model="m")
    whole = msgspec.json.decode(answer.whole(reader.whole(), end))
    kinds = [block["type"] for block in whole["content"]]
    assert kinds == ["thinking", "text", "tool_use", "text"]


@pytest.mark.parametrize(
    ("text", "stop", "reason"),
    [
        (f"<tool_call>{CALL}", None, "tool_calls"),
        (f"<tool_call>{CALL}", "</tool_call>", "tool_calls"),
        (f"<tool_call>{CALL}</tool_call> so", "!", "tool_calls"),
        (f"<tool_call>{CALL[:-5]}", None, "tool_calls"),  # the model's own end
        (f"<tool_call>{CALL[:-5]}", "}", "stop"),
        (f"<tool_call>{CALL[:-5]}", 7, "stop"),
        ('<tool_call>{"name": "f", "arguments": ', "{", "stop"),
        ('<tool_call>{"name": "f', '"', "stop"),
        ("hm", "!", "stop"),
    ],
)
def test_a_call_that_a_stop_string_cuts_off_is_not_to_be_made(
    text: str, stop: str | int | None, reason: str
) -> None:
    reader = reader_of(("hermes", "qwen3"), shows_reasoning=True)
    streamed(reader, [text], "stop")
    assert reader.finish_reason(FinishReason.STOP, stop) == reason
