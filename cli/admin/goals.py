"""When a change is done, and what it still waits for. Pure: statuses in, progress out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from cli.admin.answers import RankStatus, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`waits_for` is empty at the end: then `result` says how it ended, and `failed` whether
    somebody has changed the plan meanwhile."""

    waits_for: tuple[str, ...] = ()
    result: str = ""
    failed: bool = False


Goal = Callable[[Status], Progress]
"""What is asked of each newer status until it waits for nothing."""


def at_once(result: str) -> Goal:
    return lambda status: Progress(result=result)


def drained(select: Callable[[RankStatus], bool], name: str) -> Goal:
    """Every selected rank has left the map."""

    def progress(status: Status) -> Progress:
        ranks = [rank for rank in status.ranks if select(rank) and rank.desired]
        if not ranks or any(rank.drain is None for rank in ranks):
            return Progress(result=f"{name} is not drained: somebody undrained it", failed=True)
        if all(rank.safe_to_terminate for rank in ranks):
            return Progress(result=f"{name} is drained, and safe to terminate")
        return _waiting(status, {rank.rank for rank in ranks})

    return progress


def serving(select: Callable[[RankStatus], bool], name: str) -> Goal:
    """Every selected rank is in the map, and stays."""

    def progress(status: Status) -> Progress:
        ranks = [rank for rank in status.ranks if select(rank)]
        if not ranks or any(not rank.desired for rank in ranks):
            return Progress(result=f"{name} does not serve: it shall leave", failed=True)
        if all(rank.state == "live" for rank in ranks):
            return Progress(result=f"{name} serves")
        return _waiting(status, {rank.rank for rank in ranks})

    return progress


def scaled(status: Status) -> Progress:
    """The ranks that shall exist serve, or are drained on purpose; the others are gone."""
    wrong = {
        rank.rank
        for rank in status.ranks
        if rank.in_map != rank.desired and not (rank.desired and rank.drain is not None)
    }
    wrong |= {step.rank for step in status.change.steps if step.kind == "leave"}
    if not wrong:
        return Progress(result=f"{sum(rank.in_map for rank in status.ranks)} ranks serve")
    return _waiting(status, wrong)


def replaced(rank: int, node: str) -> Goal:
    def progress(status: Status) -> Progress:
        found = next((each for each in status.ranks if each.rank == rank), None)
        if found is None or not found.desired:
            return Progress(result=f"rank {rank} was not moved: it shall leave", failed=True)
        if found.state == "live" and found.node == node:
            return Progress(result=f"rank {rank} serves on {node}")
        return _waiting(status, {rank})

    return progress


def restarted(status: Status) -> Progress:
    """No rank waits for its restart, and those that had theirs are back."""
    left = {step.rank for step in status.change.steps if step.kind in ("restart", "join")}
    if not left:
        return Progress(result="every rank has a new process, and serves")
    return _waiting(status, left)


def _waiting(status: Status, ranks: Collection[int]) -> Progress:
    texts = tuple(step.text for step in status.change.steps if step.rank in ranks)
    return Progress(waits_for=texts or ("the next map",))
