"""What one try of a fault did to clients, computed from their streams and four moments. No I/O."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from cli.bench.stats import percentile
from cli.bench.stream_client import StreamRecord

RETURN_AFTER_S = 2.0
"""Gaps that end later than this after the fault's end belong to the return of what it ended."""

_DURING_MIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Tokens that a client got too few of, twice (or that nobody asked for), or wrong."""

    lost: int = 0
    doubled: int = 0
    changed: int = 0

    def __add__(self, other: Damage) -> Damage:
        return Damage(
            lost=self.lost + other.lost,
            doubled=self.doubled + other.doubled,
            changed=self.changed + other.changed,
        )


def damage_of(ids: Sequence[int], expected: Sequence[int], *, is_whole: bool) -> Damage:
    """`is_whole`: the stream ended well. Of one that broke off, what never came is not counted:
    its session is."""
    if list(ids) == list(expected if is_whole else expected[: len(ids)]):
        return Damage()
    total = Damage()
    matcher = SequenceMatcher(None, list(expected), list(ids), autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            continue
        never_came = not is_whole and b == len(expected)
        changed = min(b - a, d - c)
        lost = 0 if never_came else b - a - changed
        total += Damage(lost=lost, doubled=d - c - changed, changed=changed)
    return total


@dataclass(slots=True, kw_only=True)
class Stream:
    """One stream of the load. `prompt` is the index of its prompt; `ended_at` None: it runs."""

    prompt: int
    record: StreamRecord
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Of one try, in `Clock.now()` seconds. `healed_at` is `injected_at` if the fault has no end of
    its own. `whole_at` None: the instance did not become whole in time."""

    calm_from: float
    injected_at: float
    healed_at: float
    whole_at: float | None
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TryResult:
    """`gaps_ms` and `return_gaps_ms`: the longest gap of every stream that was running, around the
    fault and from then until the instance was whole and calm. Throughputs are tokens/s."""

    victim: str
    sessions: int  # streams that the try could have harmed
    lost: int  # that broke off after they had been accepted
    refused: int  # that were not accepted
    errors: tuple[str, ...]
    damage: Damage
    gaps_ms: tuple[float, ...]
    return_gaps_ms: tuple[float, ...]
    first_token_max_ms: float
    before: float
    during: float
    after: float
    held_s: float
    whole_s: float | None  # from the injection until the instance was whole


Ticks = Sequence[tuple[float, int]]
"""When how many tokens came, over all streams, in order of time."""


def try_result(
    victim: str,
    moments: Moments,
    streams: Sequence[Stream],
    expected: Sequence[Sequence[int]],
    ticks: Ticks,
) -> TryResult:
    """`expected` are the undisturbed answers by prompt."""
    m = moments
    active = [s for s in streams if _overlaps(s, m.injected_at, m.until)]
    turn = min(m.healed_at + RETURN_AFTER_S, m.until)
    whole_at = m.until if m.whole_at is None else m.whole_at
    damage = sum(
        (
            damage_of(s.record.ids, expected[s.prompt], is_whole=s.record.error is None)
            for s in active
            if s.ended_at is not None
        ),
        Damage(),
    )
    failed = [s.record for s in active if s.record.error is not None]
    first = [
        (s.record.arrivals[0] - s.record.sent_at) * 1000
        for s in active
        if s.record.arrivals and s.record.sent_at >= m.injected_at
    ]
    return TryResult(
        victim=victim,
        sessions=len(active),
        lost=sum(record.accepted for record in failed),
        refused=sum(not record.accepted for record in failed),
        errors=tuple(sorted({record.error for record in failed if record.error is not None})),
        damage=damage,
        gaps_ms=_longest(active, m.injected_at, turn),
        return_gaps_ms=_longest(active, turn, m.until),
        first_token_max_ms=max(first, default=0.0),
        before=rate(ticks, m.calm_from, m.injected_at),
        during=rate(ticks, m.injected_at, max(whole_at, m.injected_at + _DURING_MIN_S)),
        after=rate(ticks, whole_at, m.until),
        held_s=m.healed_at - m.injected_at,
        whole_s=None if m.whole_at is None else m.whole_at - m.injected_at,
    )


def rate(ticks: Ticks, since: float, until: float) -> float:
    """Tokens per second in [since, until)."""
    if until <= since:
        return 0.0
    return sum(n for at, n in ticks if since <= at < until) / (until - since)


def usual_p99_ms(streams: Sequence[Stream], moments: Sequence[Moments]) -> float:
    """99th percentile of all gaps that ended in the calm before a fault."""
    gaps = [
        (later - earlier) * 1000
        for stream in streams
        for earlier, later in itertools.pairwise(stream.record.arrivals)
        if any(m.calm_from <= earlier and later <= m.injected_at for m in moments)
    ]
    return percentile(gaps, 99)


def gaps_over_time(streams: Sequence[Stream], moments: Moments) -> list[tuple[float, float]]:
    """Every gap between tokens of a try: its end in seconds after the injection, and its length in
    ms."""
    return [
        (later - moments.injected_at, (later - earlier) * 1000)
        for stream in streams
        for earlier, later in itertools.pairwise(stream.record.arrivals)
        if moments.calm_from <= later <= moments.until
    ]


def _overlaps(stream: Stream, since: float, until: float) -> bool:
    """Whether it ran at some time after `since`, and its fate was decided before `until` or is
    open."""
    has_ended = stream.ended_at is not None and stream.ended_at <= since
    return stream.record.sent_at < until and not has_ended


def _longest(streams: Sequence[Stream], since: float, until: float) -> tuple[float, ...]:
    """Of each stream the longest gap that ended in (since, until], or is still open then."""
    found = []
    for stream in streams:
        arrivals = [at for at in stream.record.arrivals if at <= until]
        if arrivals and (stream.ended_at is None or stream.ended_at > until):
            arrivals.append(until)
        gaps = [
            (later - earlier) * 1000
            for earlier, later in itertools.pairwise(arrivals)
            if since < later
        ]
        if gaps:
            found.append(max(gaps))
    return tuple(found)
