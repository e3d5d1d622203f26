"""Keys in etcd of incarnations that are gone, which nobody needs any more. Pure."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable

from control_plane.cluster_state import ClusterState
from control_plane.writes import DeleteKeys
from shared.types import Member

_AT_ONCE_MAX = 64
VERDICTS_OF_RANK_MAX = 8
"""A verdict's lease ends after ten minutes, but etcd gives each lease its whole time again when it
starts or gets another leader. A process of an older life learns of its end by the map, too."""


def delete_stale_keys(state: ClusterState, members: Iterable[Member]) -> DeleteKeys | None:
    """`members` are those of the map. What goes on by itself under a lease is left to it."""
    present = {*members, *state.records}
    assignments = (
        state.keys.assignment(m.rank, m.incarnation) for m in state.assignments if m not in present
    )
    suspicions = (key for key, s in state.suspicions.items() if s.member not in present)
    verdicts = (
        state.keys.verdict(m.rank, m.incarnation)
        for m in _beyond_newest(state.verdicts, VERDICTS_OF_RANK_MAX)
        if m not in present
    )
    stale = itertools.chain(assignments, suspicions, verdicts)
    keys = tuple(itertools.islice(stale, _AT_ONCE_MAX))
    return DeleteKeys(keys=keys) if keys else None


def _beyond_newest(members: Collection[Member], number: int) -> list[Member]:
    """All but the newest so many of each rank."""
    by_rank: dict[int, list[Member]] = defaultdict(list)
    for member in members:
        by_rank[member.rank].append(member)
    too_many = (of_rank for of_rank in by_rank.values() if len(of_rank) > number)
    return [member for of_rank in too_many for member in sorted(of_rank)[:-number]]
