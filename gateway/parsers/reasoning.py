"""Splits reasoning that stands between two markers at the beginning of the text off the rest."""

from __future__ import annotations

from gateway.parsers.events import Content, Reasoning
from gateway.parsers.source import NO_MARKERS, Markers, Parse, Source, Step


def parse_reasoning(source: Source, *, start: str, end: str, opened: bool) -> Parse:
    """`opened`: the text begins inside the reasoning, because the prompt ends with `start`. Text
    without `start` at its beginning is all content. After the reasoning no marker counts."""
    source.hold()
    yield from source.spaces()
    found = yield from source.literal(start)
    if opened or found:
        if found:
            source.release()
        else:
            source.rewind()
        yield from reasoning_until(source, Markers(end))
        yield Reasoning("")  # none may have come: what follows begins after it all the same
    else:
        source.rewind()
    yield from source.until(NO_MARKERS, Content)


def reasoning_until(source: Source, markers: Markers) -> Step[str]:
    """Emits the text before the first marker as reasoning. Reads and returns the marker."""
    return (yield from source.until(markers, lambda text: Reasoning(text, source.offset)))
