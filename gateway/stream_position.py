"""How far a client has read a stream, as the ids of its events say it. Pure.

    id: NAME.12r3            choice 0 up to its token 12; it runs on rank 3
    id: NAME.12r3-7r0-9er3   three choices; the last one has ended
    id: NAME.12r3~0.4.2f     besides, 2 of the events that tell of the next 4 tokens of choice 0,
                             which are (f) its last
    id: NAME.b2              2 of the events that open the choices
    id: NAME.u               everything but the end of the stream
    id: NAME.12r3+57         57 events are read; only where events have numbers

An event tells of all tokens of its choice up to its id. So what is before it is left out when the
stream is resumed, and the events after it are those that would have followed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shared.types import RankId

CHOICES_MAX = 16
"""An answer of more choices cannot be resumed: every id tells of all of them."""

_CHOICE = re.compile(r"(\d{1,9})(e?)(?:r(\d{1,5}))?", re.ASCII)
_PART = re.compile(r"(\d{1,3})\.(\d{1,9})\.(\d{1,6})(f?)", re.ASCII)
_OPENING = re.compile(r"b(\d{1,3})", re.ASCII)
_NUM_EVENTS = re.compile(r"\d{1,9}", re.ASCII)
_EVERYTHING = "u"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartlyRead:
    """`num_events` of the events of the next `num_tokens` tokens are read. `is_last`: the choice
    ends with them."""

    num_tokens: int
    num_events: int
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicePosition:
    """`num_tokens` are read; `ended`: and that it has ended. `rank` had it last."""

    num_tokens: int = 0
    ended: bool = False
    rank: RankId | None = None
    then: PartlyRead | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPosition:
    """`num_opened`: so many of the events that open the choices are read. `all_read`: all events
    are, the one with the usage included. `num_events` are read, where they are counted."""

    choices: tuple[ChoicePosition, ...] = ()
    num_opened: int = 0
    all_read: bool = False
    num_events: int = 0


def read_position(text: str) -> StreamPosition | None:
    """None if it is no position."""
    place, plus, spelt_count = text.partition("+")
    if not plus:
        return _read_place(place)
    found = _read_place(place)
    if found is None or _NUM_EVENTS.fullmatch(spelt_count) is None:
        return None
    return replace(found, num_events=int(spelt_count))


def _read_place(text: str) -> StreamPosition | None:
    if text == _EVERYTHING:
        return StreamPosition(all_read=True)
    if (opening := _OPENING.fullmatch(text)) is not None:
        return StreamPosition(num_opened=int(opening[1]))
    spelt_choices, tilde, spelt_part = text.partition("~")
    found = [_CHOICE.fullmatch(spelt) for spelt in spelt_choices.split("-", CHOICES_MAX - 1)]
    choices = [_choice(each) for each in found if each is not None]
    if len(choices) != len(found):
        return None
    if tilde:
        part = _PART.fullmatch(spelt_part)
        if part is None or int(part[1]) >= len(choices):
            return None
        number = int(part[1])
        choices[number] = _with_part(choices[number], part)
    return StreamPosition(choices=tuple(choices), num_opened=len(choices))


def _choice(found: re.Match[str]) -> ChoicePosition:
    rank = None if found[3] is None else RankId(int(found[3]))
    return ChoicePosition(num_tokens=int(found[1]), ended=bool(found[2]), rank=rank)


def _with_part(choice: ChoicePosition, found: re.Match[str]) -> ChoicePosition:
    then = PartlyRead(num_tokens=int(found[2]), num_events=int(found[3]), is_last=bool(found[4]))
    return ChoicePosition(num_tokens=choice.num_tokens, rank=choice.rank, then=then)


class PositionWriter:
    """Writes the lines with the ids of one stream's events. `spelt_name` begins each id. Every line
    is one event's: they are counted if `num_events` are read already."""

    def __init__(self, spelt_name: str, num_choices: int, num_events: int | None = None) -> None:
        self._begin = b"id: " + spelt_name.encode() + b"."
        self._num_events = num_events
        self._choices = [b"0"] * num_choices
        self._line = b""
        self._join()

    def opening(self, num_opened: int) -> bytes:
        return self._counted(b"%bb%d\n" % (self._begin, num_opened))

    def everything(self) -> bytes:
        return self._counted(self._begin + _EVERYTHING.encode() + b"\n")

    def advance(self, choice: int, num_tokens: int, *, ended: bool, rank: int) -> None:
        """Choice number `choice` is read up to here from now on. `rank` below 0: it has none."""
        end = b"e" if ended else b""
        spelt = b"%d%b" % (num_tokens, end) if rank < 0 else b"%d%br%d" % (num_tokens, end, rank)
        self._choices[choice] = spelt
        self._join()

    def line(self) -> bytes:
        """For an event after which everything up to the last `advance` is read."""
        return self._counted(self._line)

    def part_line(self, choice: int, part: PartlyRead) -> bytes:
        """For an event in the middle of what comes after the last `advance`."""
        spelt = b"~%d.%d.%d" % (choice, part.num_tokens, part.num_events)
        return self._counted(self._line[:-1] + spelt + (b"f\n" if part.is_last else b"\n"))

    def _counted(self, line: bytes) -> bytes:
        if self._num_events is None:
            return line
        self._num_events += 1
        return b"%b+%d\n" % (line[:-1], self._num_events)

    def _join(self) -> None:
        self._line = self._begin + b"-".join(self._choices) + b"\n"


def position_in(event_id: str) -> tuple[str, StreamPosition] | None:
    """The name and the position in an event's id. None if it has another form."""
    name, _, spelt = event_id.partition(".")
    position = read_position(spelt)
    return None if position is None else (name, position)


def positions_of(position: StreamPosition | None, num_choices: int) -> Sequence[ChoicePosition]:
    """Of every choice; at the beginning if nothing is read of them."""
    if position is None or not position.choices:
        return [ChoicePosition()] * num_choices
    return position.choices
