"""Tool calls written as JSON between markers: Hermes (Qwen3 and others), Mistral, DeepSeek V3 and
V3.1."""

from __future__ import annotations

import re
from collections.abc import Callable

from gateway.parsers.events import CallArguments, CallStart, Content
from gateway.parsers.json_calls import json_call, json_value
from gateway.parsers.source import Markers, Parse, Source

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOL_CALLS = "[TOOL_CALLS]"
ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE, FENCE_END = "```json\n", "\n```" + CALL_END

_NAME = re.compile(r"[\w.\-]+")
_AFTER_NAME = re.compile(r"[^\w.\-]")


def call_name(text: str) -> str:
    """The name of a tool, as it stands between markers. Raises ValueError if it cannot be one."""
    name = text.strip()
    if not _NAME.fullmatch(name):
        raise ValueError("a call must have a name")
    return name


def parse_hermes(source: Source) -> Parse:
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, any number of them."""
    while (yield from source.until(Markers(TOOL_CALL), Content)):
        source.hold()
        try:
            yield from hermes_call(source)
        except ValueError:
            source.rewind()
            yield Content(TOOL_CALL)


def hermes_call(source: Source) -> Parse:
    """What follows `<tool_call>`. Raises ValueError if it is no call."""
    yield from source.spaces()
    yield from json_call(source)
    yield from source.spaces()
    yield from source.closing(TOOL_CALL_END)


def parse_mistral(source: Source) -> Parse:
    """`[TOOL_CALLS][{"name": …, "arguments": …}, …]`, or as newer models write it,
    `[TOOL_CALLS]name[ARGS]{…}` for each call."""
    while (yield from source.until(Markers(TOOL_CALLS), Content)):
        source.hold()
        try:
            yield from source.spaces()
            if (yield from source.peek()) == "[":
                yield from _mistral_list(source)
            else:
                yield from _mistral_call(source)
        except ValueError:
            source.rewind()
            yield Content(TOOL_CALLS)


def _mistral_list(source: Source) -> Parse:
    yield from source.literal("[")
    yield from source.spaces()
    yield from json_call(source)
    while True:
        yield from source.spaces()
        source.hold()
        if not (yield from source.literal(",")):
            break
        yield from source.spaces()
        try:
            yield from json_call(source)
        except ValueError:
            source.rewind()
            return
    source.release()
    yield from source.literal("]")


def _mistral_call(source: Source) -> Parse:
    parts: list[str] = []
    yield from source.scan(_AFTER_NAME, parts.append)
    name = call_name("".join(parts))
    if (yield from source.literal(CALL_ID)):
        yield from source.before(ARGS)
    else:
        yield from source.literal(ARGS)
    yield from source.spaces()
    if (yield from source.peek()) != "{":
        raise ValueError("the arguments must be an object")
    source.release()
    yield CallStart(name)
    yield from json_value(source, CallArguments)


def parse_deepseek_v3(source: Source, *, guided: bool = False) -> Parse:
    """`<｜tool▁call▁begin｜>function<｜tool▁sep｜>name`, then the arguments in a fenced block.
    `guided`: they are JSON for sure, and a marker in one of its strings is text."""
    yield from _deepseek(source, _fenced_call, guided)


def parse_deepseek_v31(source: Source, *, guided: bool = False) -> Parse:
    """`<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`. `guided` as above."""
    yield from _deepseek(source, _plain_call, guided)


def _deepseek(source: Source, call: Callable[[Source, bool], Parse], guided: bool) -> Parse:
    while opening := (yield from source.until(Markers(CALLS_BEGIN, CALL_BEGIN), Content)):
        source.hold()
        if opening == CALLS_BEGIN:
            yield from source.spaces()
            if not (yield from source.literal(CALL_BEGIN)):
                source.rewind()
                yield Content(CALLS_BEGIN)
                continue
        try:
            yield from call(source, guided)
        except ValueError:
            source.rewind()
            yield Content(opening)
            continue
        yield from source.spaces()
        yield from source.closing(CALLS_END)


def _fenced_call(source: Source, guided: bool) -> Parse:
    yield from source.before(SEPARATOR)
    name = call_name((yield from source.before("\n")))
    if not (yield from source.literal(FENCE)):
        raise ValueError("the arguments must be a block of JSON")
    source.release()
    yield CallStart(name)
    if guided:
        yield from json_value(source, CallArguments)
    yield from source.until(Markers(FENCE_END), CallArguments)


def _plain_call(source: Source, guided: bool) -> Parse:
    name = call_name((yield from source.before(SEPARATOR)))
    source.release()
    yield CallStart(name)
    if guided:
        yield from json_value(source, CallArguments)
    yield from source.until(Markers(CALL_END), CallArguments)
