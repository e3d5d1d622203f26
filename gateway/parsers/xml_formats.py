"""Tool calls written as XML-like tags, one per argument: Qwen3-Coder, GLM-4.5 and 4.6, DeepSeek
V3.2."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping

from gateway.parsers.events import CallArguments, CallStart, Content, Event
from gateway.parsers.json_formats import (
    TOOL_CALL,
    TOOL_CALL_END,
    call_name,
    hermes_call,
)
from gateway.parsers.source import Markers, Parse, Source, Step
from gateway.parsers.typed_arguments import Schema, TypedArguments, string_piece

Tools = Mapping[str, Schema]
"""The parameters' schema of each tool."""

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
ARG_KEY, ARG_KEY_END = "<arg_key>", "</arg_key>"
ARG_VALUE, ARG_VALUE_END = "<arg_value>", "</arg_value>"
DSML_CALLS, DSML_CALLS_END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
DSML_INVOKE, DSML_INVOKE_END = "<｜DSML｜invoke", "</｜DSML｜invoke>"
DSML_PARAMETER, DSML_PARAMETER_END = "<｜DSML｜parameter", "</｜DSML｜parameter>"

_ATTRIBUTE = re.compile(r'\b(\w+)="([^"]*)"')
_AFTER_GLM_NAME = re.compile(r"[<\n]")


def parse_qwen3_coder(source: Source, tools: Tools) -> Parse:
    """`<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`. The
    models sometimes forget `<tool_call>`."""
    while opening := (yield from source.until(Markers(TOOL_CALL, FUNCTION), Content)):
        source.hold()
        try:
            if opening == TOOL_CALL:
                yield from source.spaces()
                if (yield from source.peek()) == "{":
                    yield from hermes_call(source)
                    continue
                if not (yield from source.literal(FUNCTION)):
                    raise ValueError("a function must come here")
            name = call_name((yield from source.before(">")))
        except ValueError:
            source.rewind()
            yield Content(opening)
            continue
        yield from _begin(source, name)
        yield from _until_cut_off(_qwen_arguments(source, TypedArguments(tools.get(name, {}))))


def _qwen_arguments(source: Source, arguments: TypedArguments) -> Parse:
    end = Markers("\n" + PARAMETER_END, PARAMETER_END)
    yield from source.spaces()
    while (yield from source.literal(PARAMETER)):
        key = yield from source.before(">")
        yield from source.literal("\n")
        yield from _argument(source, arguments, key, end, text=arguments.is_text(key))
        yield from source.spaces()
    yield from _close(source, arguments, FUNCTION_END)
    yield from source.spaces()
    yield from source.closing(TOOL_CALL_END)


def parse_glm(source: Source, tools: Tools) -> Parse:
    """`<tool_call>name`, then `<arg_key>key</arg_key><arg_value>value</arg_value>` for each
    argument, then `</tool_call>`."""
    while (yield from source.until(Markers(TOOL_CALL), Content)):
        source.hold()
        try:
            yield from source.spaces()
            if (yield from source.peek()) == "{":
                yield from hermes_call(source)
                continue
            name = yield from _glm_name(source)
            has_key = yield from source.literal(ARG_KEY)
            if not has_key and not (yield from source.literal(TOOL_CALL_END)):
                raise ValueError("a key or the end must come here")
        except ValueError:
            source.rewind()
            yield Content(TOOL_CALL)
            continue
        yield from _begin(source, name)
        arguments = TypedArguments(tools.get(name, {}))
        if has_key:
            yield from _until_cut_off(_glm_arguments(source, arguments))
        else:
            yield CallArguments(arguments.close())


def _glm_name(source: Source) -> Step[str]:
    parts: list[str] = []
    yield from source.scan(_AFTER_GLM_NAME, parts.append)
    yield from source.spaces()
    return call_name("".join(parts))


def _glm_arguments(source: Source, arguments: TypedArguments) -> Parse:
    """The first `<arg_key>` has been read."""
    end = Markers(ARG_VALUE_END)
    has_key = True
    while has_key:
        key = (yield from source.before(ARG_KEY_END)).strip()
        yield from source.spaces()
        if not (yield from source.closing(ARG_VALUE)):
            break
        yield from _argument(source, arguments, key, end, text=arguments.is_text(key))
        yield from source.spaces()
        has_key = yield from source.literal(ARG_KEY)
    yield from _close(source, arguments, TOOL_CALL_END)


def parse_deepseek_v32(source: Source, tools: Tools) -> Parse:
    """DSML: `<｜DSML｜invoke name="…">` with `<｜DSML｜parameter name="…" string="true|false">` in
    it. `string` says whether the value is a text or JSON."""
    while opening := (yield from source.until(Markers(DSML_CALLS, DSML_INVOKE), Content)):
        source.hold()
        try:
            if opening == DSML_CALLS:
                yield from source.spaces()
                if not (yield from source.literal(DSML_INVOKE)):
                    raise ValueError("a call must come here")
            attributes = yield from _attributes(source)
            name = call_name(attributes.get("name", ""))
        except ValueError:
            source.rewind()
            yield Content(opening)
            continue
        yield from _begin(source, name)
        yield from _until_cut_off(_dsml_arguments(source, TypedArguments(tools.get(name, {}))))
        yield from source.spaces()
        yield from source.closing(DSML_CALLS_END)


def _dsml_arguments(source: Source, arguments: TypedArguments) -> Parse:
    end = Markers(DSML_PARAMETER_END)
    yield from source.spaces()
    while (yield from source.literal(DSML_PARAMETER)):
        attributes = yield from _attributes(source)
        key = attributes.get("name", "")
        text = attributes.get("string") == "true" or arguments.is_text(key)
        yield from _argument(source, arguments, key, end, text=text)
        yield from source.spaces()
    yield from _close(source, arguments, DSML_INVOKE_END)


def _attributes(source: Source) -> Step[dict[str, str]]:
    return dict(_ATTRIBUTE.findall((yield from source.before(">"))))


def _begin(source: Source, name: str) -> Parse:
    source.release()
    yield CallStart(name)


def _until_cut_off(arguments: Parse) -> Parse:
    """A call that has begun keeps what came of it if the text ends in a key."""
    with contextlib.suppress(ValueError):
        yield from arguments


def _argument(
    source: Source, arguments: TypedArguments, key: str, end: Markers, *, text: bool
) -> Parse:
    """`text`: the value is a string, which is passed on as it comes."""
    yield CallArguments(arguments.key(key))
    if text:
        yield CallArguments('"')
        if (yield from source.until(end, _string_piece)):
            yield CallArguments('"')
        return
    parts: list[str] = []
    ended = yield from source.until(end, parts.append)
    value = "".join(parts)
    yield CallArguments(arguments.value(key, value) if ended else value)


def _string_piece(text: str) -> Event:
    return CallArguments(string_piece(text))


def _close(source: Source, arguments: TypedArguments, end: str) -> Parse:
    """A call that is cut off stays open, so that it does not look whole."""
    ended = yield from source.closing(end)
    if ended or (yield from source.peek()):
        yield CallArguments(arguments.close())
