"""Reads JSON from a model's text as it arrives: one value, or an object that describes a call."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from gateway.parsers.events import CallArguments, CallStart
from gateway.parsers.source import Emit, Parse, Source, Step

_STRUCTURE = re.compile(r'["{}\[\]<]')
"""What counts outside strings. JSON has no "<" there: a marker that cuts a broken value off."""
_IN_STRING = re.compile(r'["\\]')
_AFTER_SCALAR = re.compile(r"[^-+.\w]")
_ARGUMENTS = ("arguments", "parameters")


@dataclass(slots=True)
class _Call:
    name: str | None = None
    arguments: str | None = None  # that came before the name
    begun: bool = False


def json_call(source: Source) -> Parse:
    """Reads `{"name": …, "arguments": …}`; the keys may come in any order, and others are ignored.
    Raises ValueError if it is no call; nothing was emitted then. A call that breaks off later keeps
    what came so far, and its rest stays unread."""
    call = _Call()
    try:
        yield from _members(source, call)
    except ValueError:
        if not call.begun:
            raise


def _members(source: Source, call: _Call) -> Parse:
    yield from _expect(source, "{")
    while True:
        yield from source.spaces()
        key = yield from json_string(source)
        yield from source.spaces()
        yield from _expect(source, ":")
        yield from source.spaces()
        if key == "name" and call.name is None:
            call.name = yield from json_string(source)
        elif key in _ARGUMENTS and call.name is not None and not call.begun:
            yield from _begin(source, call)
            yield from _stream_arguments(source)
        else:
            value = yield from _whole_value(source)
            call.arguments = value if key in _ARGUMENTS else call.arguments
        yield from source.spaces()
        if not (yield from source.literal(",")):
            break
    yield from _expect(source, "}")
    if not call.begun:
        yield from _begin(source, call)
        yield CallArguments(call.arguments or "{}")


def _expect(source: Source, text: str) -> Parse:
    if not (yield from source.literal(text)):
        raise ValueError(f"{text} must come here")


def _begin(source: Source, call: _Call) -> Parse:
    if call.name is None:
        raise ValueError("a call must have a name")
    call.begun = True
    source.release()
    yield CallStart(call.name)


def _stream_arguments(source: Source) -> Parse:
    """Some models write the arguments as a string that contains JSON."""
    if (yield from source.peek()) == '"':
        yield CallArguments((yield from json_string(source)))
    else:
        yield from json_value(source, CallArguments)


def _whole_value(source: Source) -> Step[str]:
    if (yield from source.peek()) == '"':
        return (yield from json_string(source))
    parts: list[str] = []
    yield from json_value(source, parts.append)
    if not parts:
        raise ValueError("a value is missing")
    return "".join(parts)


def json_string(source: Source) -> Step[str]:
    """Reads a whole string. Raises ValueError if none comes."""
    yield from _expect(source, '"')
    parts = ['"']
    yield from _rest_of_string(source, parts.append)
    text: str = json.loads("".join(parts), strict=False)
    text.encode()  # raises ValueError for half a surrogate pair, which is no text
    return text


def json_value(source: Source, emit: Emit) -> Parse:
    """Emits one value as it is written. A broken one ends at the first "<" outside a string, or
    with the text."""
    first = yield from source.peek()
    if first and first not in '{["':
        yield from source.scan(_AFTER_SCALAR, emit)
        return
    depth = 0
    while (stop := (yield from source.scan(_STRUCTURE, emit))) not in ("", "<"):
        yield from source.take(1, emit)
        if stop == '"':
            yield from _rest_of_string(source, emit)
        else:
            depth += 1 if stop in "{[" else -1
        if depth <= 0:
            return


def _rest_of_string(source: Source, emit: Emit) -> Parse:
    """Reads to the closing quote, or to the end of the text."""
    while stop := (yield from source.scan(_IN_STRING, emit)):
        yield from source.take(2 if stop == "\\" else 1, emit)
        if stop == '"':
            return
