"""Which CPUs each rank of a host runs on. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shared.types import RankId


def share_cpus(cpus: Sequence[int], ranks: Sequence[RankId]) -> dict[RankId, frozenset[int]]:
    """Gives each rank an equal share of neighbouring CPUs. If there are more ranks than CPUs,
    several ranks share a CPU. Ranks wait for each other many times per step, so a rank that is
    moved to a CPU on which another one computes delays all of them."""
    ordered = sorted(cpus)
    if len(ordered) < len(ranks):
        return {r: frozenset((ordered[i % len(ordered)],)) for i, r in enumerate(ranks)}
    bounds = [i * len(ordered) // len(ranks) for i in range(len(ranks) + 1)]
    return {r: frozenset(ordered[a:b]) for r, a, b in zip(ranks, bounds, bounds[1:], strict=False)}
