"""Ids of events: what is written of a position is read again, and nothing else is a position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stream_position import (
    CHOICES_MAX,
    ChoicePosition,
    PartlyRead,
    PositionWriter,
    StreamPosition,
    position_in,
    read_position,
)
from shared.types import RankId


def position_of(line: bytes) -> StreamPosition:
    found = position_in(line.decode().removeprefix("id: ").removesuffix("\n"))
    assert found is not None
    name, position = found
    assert name == "NAME"
    return position


def at(num_tokens: int, rank: int = 3) -> ChoicePosition:
    return ChoicePosition(num_tokens=num_tokens, rank=RankId(rank))


def test_the_lines_of_a_stream() -> None:
    ids = PositionWriter("NAME", 2)
    assert ids.opening(1) == b"id: NAME.b1\n"
    ids.advance(0, 12, ended=False, rank=3)
    assert ids.line() == b"id: NAME.12r3-0\n"
    ids.advance(1, 7, ended=True, rank=-1)
    assert ids.line() == b"id: NAME.12r3-7e\n"
    part = PartlyRead(num_tokens=4, num_events=2, is_last=True)
    assert ids.part_line(0, part) == b"id: NAME.12r3-7e~0.4.2f\n"
    assert ids.everything() == b"id: NAME.u\n"


def test_what_is_written_is_read() -> None:
    ids = PositionWriter("NAME", 2)
    assert position_of(ids.opening(2)) == StreamPosition(num_opened=2)
    assert position_of(ids.everything()) == StreamPosition(all_read=True)
    ids.advance(1, 5, ended=False, rank=3)
    part = PartlyRead(num_tokens=4, num_events=2, is_last=False)
    read = ChoicePosition(num_tokens=5, rank=RankId(3), then=part)
    assert position_of(ids.part_line(1, part)).choices == (ChoicePosition(), read)
    ids.advance(1, 9, ended=True, rank=3)
    ended = ChoicePosition(num_tokens=9, ended=True, rank=RankId(3))
    assert position_of(ids.line()) == StreamPosition(
        choices=(ChoicePosition(), ended), num_opened=2
    )


def test_events_are_counted_from_those_that_are_read() -> None:
    ids = PositionWriter("NAME", 1, num_events=0)
    assert ids.opening(1) == b"id: NAME.b1+1\n"
    assert position_of(ids.opening(2)) == StreamPosition(num_opened=2, num_events=2)
    ids.advance(0, 12, ended=False, rank=3)
    assert ids.line() == b"id: NAME.12r3+3\n"
    again = PositionWriter("NAME", 1, num_events=3)
    part = PartlyRead(num_tokens=4, num_events=2, is_last=True)
    line = again.part_line(0, part)
    assert line == b"id: NAME.0~0.4.2f+4\n"
    assert position_of(line).choices == (ChoicePosition(then=part),)
    assert position_of(line).num_events == 4


@given(st.lists(st.integers(0, 10**9 - 1), min_size=1, max_size=CHOICES_MAX))
def test_positions_of_all_choices_are_read(counts: list[int]) -> None:
    ids = PositionWriter("NAME", len(counts))
    for number, count in enumerate(counts):
        ids.advance(number, count, ended=False, rank=3)
    assert position_of(ids.line()).choices == tuple(map(at, counts))


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", "x", "1-", "-1", "1.2", "1r", "1e5", "b", "b-1", "u1", "1~", "1~0", "1~0.1"),
        *(
            "1~1.1.1",
            "1~0.1.1ff",
            "1~-1.1.1",
            "1\n",
            "1+",
            "+1",
            "1+-1",
            "1+1+1",
            "1+1r1",
            " 1",
            "\uff11",
            "1" * 10,
            "1r100000",
        ),
        "-".join(["1"] * (CHOICES_MAX + 1)),
        "9" * 100_000,
        "1-" * 100_000,
    ],
)
def test_what_is_no_position_is_none(text: str) -> None:
    assert read_position(text) is None


@given(st.text(alphabet="0123456789-~.+erbuf", max_size=20))
def test_whatever_is_sent_is_read_or_refused(text: str) -> None:
    position = read_position(text)
    assert position is None or len(position.choices) <= CHOICES_MAX
