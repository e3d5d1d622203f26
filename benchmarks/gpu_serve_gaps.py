"""Computes what clients saw of a fault from their streams. Pure. Part of `benchmarks.gpu_serve`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_serve_load import Arrival, Turn

_RATE_WINDOW_S = 0.5
_RATE_STEP_S = 0.01
_RECOVERED = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Contains the pauses that begin before its end and end after its begin."""

    begin: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Pause:
    """Between two tokens of one stream. `rank` is the one that it began on."""

    ms: float
    begin: float
    rank: int | None = field(compare=False)


def longest_pauses(turns: Sequence[Turn], window: Window, now: float) -> list[Pause]:
    """The longest pause of every stream that has one in the window. The last pause of a running
    stream has not ended yet."""
    longest = (max(_pauses(turn, window, now), default=None) for turn in turns)
    return [pause for pause in longest if pause is not None]


def longest_gaps_ms(turns: Sequence[Turn], window: Window, now: float) -> list[float]:
    return [pause.ms for pause in longest_pauses(turns, window, now)]


def _pauses(turn: Turn, window: Window, now: float) -> Iterator[Pause]:
    record = turn.record
    runs = record.finish is None and record.error is None
    times = [*record.arrivals, now] if runs and record.arrivals else record.arrivals
    for earlier, later in itertools.pairwise(times):
        if later > window.begin and earlier < window.end:
            yield Pause(ms=(later - earlier) * 1e3, begin=earlier, rank=record.rank)


def first_tokens_ms(turns: Sequence[Turn], window: Window, now: float) -> list[float]:
    """How long streams waited for their first token, if they did so in the window."""
    waits = (
        (t.record.sent_at, t.record.arrivals[0] if t.record.arrivals else now)
        for t in turns
        if t.record.error is None
    )
    return [
        (until - since) * 1e3
        for since, until in waits
        if until > window.begin and since < window.end
    ]


def had_begun(turns: Sequence[Turn], moment: float) -> list[Turn]:
    """Streams that had a token by then. These can be interrupted by a fault."""
    return [t for t in turns if t.record.arrivals and t.record.arrivals[0] <= moment]


class Throughput:
    """The tokens of all streams together."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._at_N: NDArray[np.float64] = np.array([a.at for a in arrivals])
        counts_N = np.array([a.num_tokens for a in arrivals], dtype=np.int64)
        self._before_N: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts_N)])

    def tokens_per_s(self, begin: float, end: float) -> float:
        if end <= begin:
            return math.nan
        first, last = np.searchsorted(self._at_N, [begin, end])
        return float(self._before_N[last] - self._before_N[first]) / (end - begin)

    def recovered_ms(self, fault: Window, wanted: float, now: float) -> float | None:
        """Milliseconds from the fault to the begin of the first half second with 95 % of the wanted
        rate, after the longest silence of all streams together that begins in the window. None if
        that has not happened."""
        first, last = np.searchsorted(self._at_N, [fault.begin, fault.end])
        after = self._at_N[first : last + 1]
        if not len(after):
            return None
        begin = float(after[np.argmax(np.diff(after, prepend=fault.begin))])
        while begin + _RATE_WINDOW_S <= now:
            if self.tokens_per_s(begin, begin + _RATE_WINDOW_S) >= _RECOVERED * wanted:
                return (begin - fault.begin) * 1e3
            begin += _RATE_STEP_S
        return None


def ran_at(turns: Sequence[Turn], moments: Sequence[float], now: float) -> list[Turn]:
    """Streams that had begun and had not ended at one of these moments."""
    return [t for t in turns if any(_ran_at(t, moment, now) for moment in moments)]


def _ran_at(turn: Turn, moment: float, now: float) -> bool:
    record = turn.record
    runs = record.finish is None and record.error is None
    end = now if runs else max(record.arrivals, default=record.sent_at)
    return record.sent_at <= moment <= end


def first_wrong(turn: Turn, answer: Sequence[int]) -> int | None:
    """The index of the first token that differs from the undisturbed answer to the same prompt, or
    is missing, or is extra. None if all are equal."""
    record = turn.record
    for index, (token, expected) in enumerate(zip(record.ids, answer, strict=False)):
        if token != expected:
            return index
    if record.finish is not None and len(record.ids) != turn.wanted_tokens:
        return min(len(record.ids), turn.wanted_tokens)
    return len(answer) if len(record.ids) > len(answer) else None


def errors(turns: Sequence[Turn]) -> list[str]:
    return [turn.record.error for turn in turns if turn.record.error is not None]
