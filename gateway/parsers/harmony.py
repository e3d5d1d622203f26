"""The harmony format of gpt-oss: messages with a channel and maybe a recipient. `analysis` is
reasoning, `final` and a commentary without recipient are content, a message to `functions.NAME` is
a call."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gateway.parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from gateway.parsers.json_calls import json_value
from gateway.parsers.reasoning import reasoning_until
from gateway.parsers.source import NO_MARKERS, Markers, Parse, Source, Step

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
FUNCTIONS = "functions."
_TO = "to="

_AFTER_BODY = Markers(END, CALL, RETURN, START, CHANNEL)
_BEGIN = Markers(START, CHANNEL)
_HEADER_END = Markers(MESSAGE, END, CALL, RETURN)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


def parse_harmony(source: Source, *, calls: bool, guided: bool = False) -> Parse:
    """`calls`: messages to functions are calls; else they are content. Text outside messages is
    content. `guided`: the message that is no reasoning is the last one and follows a grammar, so a
    marker in it is text."""
    seen: set[type[Event]] = set()
    opening = yield from _first_opening(source)
    while opening:
        header: list[str] = []
        if (yield from source.until(_HEADER_END, header.append)) == MESSAGE:
            source.release()
            body_end = yield from _body(source, opening + "".join(header), seen, calls, guided)
        else:
            source.rewind()
            yield Content(opening)
            body_end = ""
        if body_end in (START, CHANNEL):  # the end of the message was forgotten
            opening = body_end
        else:
            opening = yield from source.until(_BEGIN, Content)
        source.hold()


def _first_opening(source: Source) -> Step[str]:
    """The prompt ends with `<|start|>assistant`, and a recipient may come before the channel."""
    source.hold()
    yield from source.spaces()
    if not (yield from source.literal(_TO)):
        source.rewind()
        opening = yield from source.until(_BEGIN, Content)
        source.hold()
        return opening
    source.hold()
    return _TO


def _body(
    source: Source, header: str, seen: set[type[Event]], calls: bool, guided: bool
) -> Step[str]:
    """Another reasoning or content begins on a line of its own. `seen` are the kinds so far.
    Returns the marker that ended the message."""
    recipient = _RECIPIENT.search(header)
    channel = _CHANNEL_NAME.search(header)
    if calls and recipient is not None:
        yield CallStart(recipient.group(1).removeprefix(FUNCTIONS))
        if guided:
            yield from json_value(source, CallArguments)
        return (yield from source.until(_AFTER_BODY, CallArguments))
    if channel is not None and channel.group(1) == "analysis" and recipient is None:
        yield from _new_line(Reasoning("\n"), seen)
        return (yield from reasoning_until(source, _AFTER_BODY))
    yield from _new_line(Content("\n"), seen)
    return (yield from source.until(NO_MARKERS if guided else _AFTER_BODY, Content))


def _new_line(event: Event, seen: set[type[Event]]) -> Iterator[Event]:
    if type(event) in seen:
        yield event
    seen.add(type(event))
