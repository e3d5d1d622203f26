"""The text of one answer as it arrives. Parsers are generators over it: they yield events, and None
when they need more text, so that the result never depends on how the text is cut into pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from gateway.parsers.events import Event

T = TypeVar("T")
Step = Generator[Event | None, None, T]
"""A part of a parser that returns a T. It yields None when it waits for more text."""
Parse = Step[None]
Emit = Callable[[str], Event | None]
"""Makes an event of a piece of text, or keeps the text and returns None."""


REREAD_CHARS_MAX = 1 << 16
"""So much of an answer is read again, after `rewind`, before no marker counts any more: a client
may have the model write any text, and others shall not wait while it is read."""


class Markers:
    """Strings that structure the text. None of them may be the beginning of another one."""

    __slots__ = ("_longest", "_pattern", "_strings")

    def __init__(self, *strings: str) -> None:
        self._strings = strings
        self._longest = max(map(len, strings), default=0)
        self._pattern = re.compile("|".join(map(re.escape, strings)) if strings else r"(?!)")

    def search(self, text: str, begin: int) -> re.Match[str] | None:
        return self._pattern.search(text, begin)

    def num_held_back(self, text: str, begin: int) -> int:
        """Length of the longest suffix of `text[begin:]` that may become a marker."""
        for length in range(min(len(text) - begin, self._longest - 1), 0, -1):
            tail = text[len(text) - length :]
            if any(len(s) > length and s.startswith(tail) for s in self._strings):
                return length
        return 0


NO_MARKERS = Markers()


class Source:
    """What has arrived and is not read yet. `hold` marks a place to which `rewind` returns. Once
    REREAD_CHARS_MAX characters have been read in vain, `until` finds no marker any more."""

    __slots__ = ("_at", "_dropped", "_ended", "_held", "_num_reread", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._dropped = 0
        self._held: int | None = None
        self._num_reread = 0
        self._ended = False

    @property
    def offset(self) -> int:
        """How many characters of the whole text have been read."""
        return self._dropped + self._at

    def add(self, text: str) -> None:
        kept = self._at if self._held is None else self._held
        self._text = self._text[kept:] + text
        self._at -= kept
        self._dropped += kept
        if self._held is not None:
            self._held = 0

    def end(self) -> None:
        self._ended = True

    def hold(self) -> None:
        self._held = self._at

    def release(self) -> None:
        self._held = None

    def rewind(self) -> None:
        """Returns to the place of `hold`, if there is one."""
        if self._held is not None:
            self._num_reread += self._at - self._held
            self._at, self._held = self._held, None

    def more(self) -> Step[bool]:
        """Waits for more text. False: there is none."""
        if self._ended:
            return False
        yield None
        return True

    def peek(self) -> Step[str]:
        """The next character, which stays unread; empty at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def literal(self, expected: str) -> Step[bool]:
        """Whether `expected` comes next; if so, it is read."""
        while True:
            seen = self._text[self._at : self._at + len(expected)]
            if seen == expected:
                self._at += len(expected)
                return True
            if not expected.startswith(seen) or not (yield from self.more()):
                return False

    def closing(self, expected: str) -> Step[bool]:
        """Like `literal`, but what is cut off at the end of the text is read, too."""
        if (yield from self.literal(expected)):
            return True
        if self._ended and expected.startswith(self._text[self._at :]):
            self._at = len(self._text)
        return False

    def spaces(self) -> Step[None]:
        """Reads white space."""
        while (yield from self.peek()).isspace():
            self._at += 1

    def until(self, markers: Markers, emit: Emit) -> Step[str]:
        """Reads up to and with the first marker, and returns that; empty at the end. Emits the text
        before it as it comes."""
        if self._num_reread > REREAD_CHARS_MAX:
            markers = NO_MARKERS
        while True:
            found = markers.search(self._text, self._at)
            if found is not None:
                yield from self._pass(found.start(), emit)
                self._at = found.end()
                return found.group()
            held = 0 if self._ended else markers.num_held_back(self._text, self._at)
            yield from self._pass(len(self._text) - held, emit)
            if not (yield from self.more()):
                return ""

    def before(self, marker: str) -> Step[str]:
        """Reads up to and with `marker`, and returns the text before it. Raises ValueError if it
        does not come."""
        parts: list[str] = []
        if not (yield from self.until(Markers(marker), parts.append)):
            raise ValueError(f"{marker} is missing")
        return "".join(parts)

    def scan(self, stops: re.Pattern[str], emit: Emit) -> Step[str]:
        """Emits the text before the first character that `stops` matches. The character is
        returned and stays unread; empty at the end."""
        while True:
            found = stops.search(self._text, self._at)
            yield from self._pass(len(self._text) if found is None else found.start(), emit)
            if found is not None:
                return found.group()
            if not (yield from self.more()):
                return ""

    def take(self, count: int, emit: Emit) -> Parse:
        """Reads and emits so many characters; fewer at the end."""
        while len(self._text) - self._at < count and (yield from self.more()):
            pass
        yield from self._pass(min(self._at + count, len(self._text)), emit)

    def _pass(self, end: int, emit: Emit) -> Parse:
        """Emits what is unread before `end`. `offset` is its place while `emit` is called."""
        if end > self._at:
            event = emit(self._text[self._at : end])
            self._at = end
            if event is not None:
                yield event


class IncrementalParser:
    """Runs a parser over text that comes in pieces."""

    def __init__(self, parse: Callable[[Source], Parse]) -> None:
        self._source = Source()
        self._run = parse(self._source)

    def feed(self, text: str) -> list[Event]:
        self._source.add(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """Call at the end of the text. What was held back comes out."""
        self._source.end()
        return self._advance()

    def _advance(self) -> list[Event]:
        events: list[Event] = []
        for event in self._run:
            if event is None:
                break
            events.append(event)
        return events
