"""The parser of one choice: splits its text into reasoning, content and calls, and counts the
tokens of the reasoning."""

from __future__ import annotations

from collections.abc import Callable

from gateway.parsers.events import CallStart, Content, Event, Reasoning, merged
from gateway.parsers.source import IncrementalParser, Parse, Source

ParseFunction = Callable[[Source], Parse]


class OutputParser:
    """`first` splits the text; `then` splits its content further. Both are optional. White space
    around reasoning and beside calls is formatting, and left out."""

    def __init__(
        self, *, first: ParseFunction | None, then: ParseFunction | None, calls_max: int | None
    ) -> None:
        self._first = IncrementalParser(first) if first is not None else None
        self._then = IncrementalParser(then) if then is not None else None
        self._filter = _EventFilter(calls_max)
        self.reasoning_spans: list[tuple[int, int]] = []
        """Where the reasoning is in the whole text, in characters."""

    def feed(self, text: str) -> list[Event]:
        if self._first is None:
            return self._filtered(self._split_content([Content(text)]))
        return self._filtered(self._split_content(self._first.feed(text)))

    def finish(self) -> list[Event]:
        events = self._split_content(self._first.finish() if self._first is not None else [])
        if self._then is not None:
            events += self._then.finish()
        return self._filtered(events, ended=True)

    def _split_content(self, events: list[Event]) -> list[Event]:
        self._note_spans(events)
        if self._then is None:
            return events
        result: list[Event] = []
        for event in events:
            result += self._then.feed(event.text) if isinstance(event, Content) else [event]
        return result

    def _note_spans(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Reasoning) and event.begin >= 0:
                begin, end = event.begin, event.begin + len(event.text)
                if self.reasoning_spans and self.reasoning_spans[-1][1] == begin:
                    begin = self.reasoning_spans.pop()[0]
                self.reasoning_spans.append((begin, end))

    def _filtered(self, events: list[Event], *, ended: bool = False) -> list[Event]:
        kept: list[Event] = []
        for event in events:
            kept += self._filter.take(event)
        if ended:
            kept += self._filter.finish()
        return merged(kept)


class _EventFilter:
    """Leaves out white space that is only formatting, and calls beyond `calls_max`."""

    def __init__(self, calls_max: int | None) -> None:
        self._calls_max = calls_max
        self._num_calls = 0
        self._held: list[str] = []  # white space of the content, until it is known what follows
        self._held_reasoning: list[str] = []
        self._skips = False  # reasoning or a call came last
        self._has_reasoning = False

    def take(self, event: Event) -> list[Event]:
        match event:
            case Reasoning(text, begin):
                return self._reasoning(text, begin)
            case Content(text):
                return self._content(text)
            case CallStart():
                self._num_calls += 1
                self._held, self._skips = [], True
        if self._calls_max is not None and self._num_calls > self._calls_max:
            return []
        return [event]

    def finish(self) -> list[Event]:
        held, self._held = self._held, []
        return [Content("".join(held))]

    def _reasoning(self, text: str, begin: int) -> list[Event]:
        self._skips = True
        if not self._has_reasoning:
            text = text.lstrip()
        shown = _without_end(text, self._held_reasoning)
        self._has_reasoning |= bool(shown)
        return [Reasoning(shown, begin)]

    def _content(self, text: str) -> list[Event]:
        if self._skips:
            text = text.lstrip()
            self._skips = not text
        return [Content(_without_end(text, self._held))]


def _without_end(text: str, held: list[str]) -> str:
    """The text after what is held, but for the white space at its end, which is held from now on.
    Each piece of a long run of it is looked at once."""
    shown = text.rstrip()
    if not shown:
        held.append(text)
        return ""
    whole = "".join((*held, shown))
    held[:] = [text[len(shown) :]]
    return whole
