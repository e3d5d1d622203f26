"""How ranks are named to people."""

from __future__ import annotations

from collections.abc import Collection


def names_of(ranks: Collection[int]) -> str:
    """Such as "rank 3", or "ranks 0-3, 7"."""
    ordered, runs = sorted(ranks), list[list[int]]()
    for rank in ordered:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spelt = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("rank " if len(ordered) == 1 else "ranks ") + ", ".join(spelt)
