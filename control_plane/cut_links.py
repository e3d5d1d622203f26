"""Which members cannot reach each other though both reach us, and whose end lets the others go on.
Pure. Neither of the two is dead, but no step completes while both are in the map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from control_plane.detector_timings import DetectorTimings
from control_plane.watched_member import WatchedMember

_YOUNG = 0.5
"""A pair that is cut for this part of the time tells whom to blame, if another is for all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _CutPair:
    """`seconds`: for how long the one has been asked by the other, while both answered us without a
    pause. `certainty`: at 1 they are cut off from each other."""

    both: tuple[WatchedMember, WatchedMember]
    seconds: float
    certainty: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOff:
    """`blamed` is cut off from most others; `others` are those."""

    blamed: WatchedMember
    others: tuple[WatchedMember, ...]
    seconds: float

    @property
    def detail(self) -> str:
        names = ", ".join(str(other.member) for other in self.others)
        return f"for {self.seconds:.2f} s it and {names} do not hear each other, and we hear both"


def find_cut_off(
    members: Collection[WatchedMember],
    attentive_s: float,
    timings: DetectorTimings,
    is_excused: Callable[[WatchedMember], bool],
) -> CutOff | None:
    """None if all members that answer us hear each other, as far as they have asked."""
    pairs = list(_cut_pairs(members, attentive_s, timings, is_excused))
    surest = max(pairs, key=lambda pair: pair.certainty, default=None)
    if surest is None or surest.certainty < 1.0:
        return None
    # Of pairs that were cut at one moment we learn one after another: the younger ones tell, too.
    counts = Counter(watched.member for pair in pairs for watched in pair.both)
    blamed = max(surest.both, key=lambda w: (counts[w.member], w.member.rank))
    mine = [pair.both for pair in pairs if blamed in pair.both]
    return CutOff(
        blamed=blamed,
        others=tuple(other if one is blamed else one for one, other in mine),
        seconds=surest.seconds,
    )


def _cut_pairs(
    members: Collection[WatchedMember],
    attentive_s: float,
    timings: DetectorTimings,
    is_excused: Callable[[WatchedMember], bool],
) -> Iterator[_CutPair]:
    """Each pair once. A process that was paused is unheard by its peers, too, and by us."""
    by_rank: dict[int, WatchedMember] = {watched.member.rank: watched for watched in members}
    seen: set[frozenset[int]] = set()
    for asker in members:
        for rank, since_attentive_s in asker.unheard.items():
            peer = by_rank.get(rank)
            pair = frozenset((asker.member.rank, rank))
            if peer is None or peer is asker or pair in seen:
                continue
            both = (asker, peer)
            if any(
                is_excused(w)
                or w.is_stopped
                or attentive_s - w.pong_attentive_s > timings.answer_gap_max_s
                for w in both
            ):
                continue
            until = min(w.pong_attentive_s for w in both)
            since = max(since_attentive_s, *(w.answering_since_attentive_s for w in both))
            prompt_since = max(since, *(w.prompt_since_attentive_s for w in both))
            certainty = max(
                (until - since) / timings.cut_off_slow_s, (until - prompt_since) / timings.cut_off_s
            )
            if certainty >= _YOUNG:
                seen.add(pair)
                yield _CutPair(both=both, seconds=until - since, certainty=certainty)
