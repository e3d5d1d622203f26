"""When a change is done, what it still waits for, and whether somebody else has changed the plan so
that it never will be. Pure: statuses in, progress out.

What was asked for is compared with the plan of each status, which is never older than the change:
that a change is no longer under way does not say that it was carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from cli.admin.answers import Accepted, RankStatus, Status
from shared.rank_names import names_of

STAY = "stay"
"""The `after` of a drain that somebody asked for, and that only an undrain ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`waits_for` is empty at the end: then `result` says how it ended, and `failed` whether
    somebody has changed the plan meanwhile."""

    waits_for: tuple[str, ...] = ()
    result: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was answered to the request, and the process that each rank had before it."""

    accepted: Accepted
    processes: Mapping[int, int] = field(default_factory=dict)

    def has_new_process(self, rank: RankStatus) -> bool:
        """An older control plane does not tell of processes."""
        return rank.process is None or rank.process != self.processes.get(rank.rank)


Goal = Callable[[Status, Asked], Progress]
"""What is asked of each newer status until it waits for nothing."""


def drained(select: Callable[[RankStatus], bool], name: str) -> Goal:
    """Every selected rank has left the map, and stays outside."""

    def progress(status: Status, asked: Asked) -> Progress:
        ranks = [rank for rank in status.ranks if select(rank) and rank.desired]
        if not ranks:
            return _overtaken(f"{name} is not drained: it shall not exist any more")
        if any(rank.after == "" for rank in ranks):
            return _overtaken(f"{name} is not drained: somebody undrained it")
        if moved := [rank.rank for rank in ranks if rank.after != STAY]:
            return _overtaken(f"{name} does not stay drained: {names_of(moved)} shall start again")
        if all(rank.safe_to_terminate for rank in ranks):
            return Progress(result=f"{name} is drained, and safe to terminate")
        return _waiting(status, {rank.rank for rank in ranks})

    return progress


def serving(select: Callable[[RankStatus], bool], name: str) -> Goal:
    """Every selected rank is in the map, and stays."""

    def progress(status: Status, asked: Asked) -> Progress:
        ranks = [rank for rank in status.ranks if select(rank)]
        if not ranks or any(not rank.desired for rank in ranks):
            return _overtaken(f"{name} does not serve: it shall leave")
        if again := [rank.rank for rank in ranks if rank.after == STAY]:
            return _overtaken(f"{name} does not serve: somebody drained {names_of(again)} again")
        if all(rank.state == "live" for rank in ranks):
            return Progress(result=f"{name} serves")
        return _waiting(status, {rank.rank for rank in ranks})

    return progress


def scaled(
    num_ranks: int | None = None, *, with_: Collection[int] = (), without: Collection[int] = ()
) -> Goal:
    """The ranks that shall exist serve, or are drained on purpose; the others are gone. They are
    `num_ranks`, or as many as were accepted, and among them those of `with_`, none of `without`."""

    def progress(status: Status, asked: Asked) -> Progress:
        wanted = asked.accepted.ranks if num_ranks is None else num_ranks
        desired = {rank.rank for rank in status.ranks if rank.desired}
        if wanted not in (None, len(desired)):
            return _overtaken(f"not scaled to {wanted} ranks: {len(desired)} shall exist")
        if missing := set(with_) - desired:
            return _overtaken(f"not scaled: {names_of(missing)} shall not exist any more")
        if kept := set(without) & desired:
            return _overtaken(f"not scaled: {names_of(kept)} shall stay")
        drained = [r.rank for r in status.ranks if r.desired and r.after == STAY and not r.in_map]
        wrong = {
            rank.rank
            for rank in status.ranks
            if (rank.desired and rank.state not in ("live", "draining", "drained"))
            or (rank.desired and not rank.in_map and rank.after != STAY)
            or (rank.in_map and not rank.desired)
        }
        wrong |= {step.rank for step in status.change.steps if step.kind == "leave"}
        if wrong:
            return _waiting(status, wrong)
        apart = f"; {names_of(drained)} {_is(drained)} drained" if drained else ""
        return Progress(result=f"{sum(rank.in_map for rank in status.ranks)} ranks serve{apart}")

    return progress


def replaced(rank: int, node: str) -> Goal:
    """The rank serves on the node, in a process that it did not have before."""

    def progress(status: Status, asked: Asked) -> Progress:
        found = next((each for each in status.ranks if each.rank == rank), None)
        if found is None or not found.desired:
            return _overtaken(f"rank {rank} was not moved: it shall leave")
        if found.after == STAY:
            return _overtaken(f"rank {rank} was not moved: somebody drained it")
        if found.desired_node not in ("", node):
            return _overtaken(f"rank {rank} was not moved: it shall run on {found.desired_node}")
        if found.node == node and found.state == "live":
            if asked.has_new_process(found):
                return Progress(result=f"rank {rank} serves on {node}")
            return _overtaken(f"rank {rank} was not moved: somebody undrained it")
        if found.after == "" and not found.desired_node and found.node not in ("", node):
            return _overtaken(f"rank {rank} was not moved: it shall stay on {found.node}")
        return _waiting(status, {rank})

    return progress


def restarted(only: Collection[int] = ()) -> Goal:
    """Every rank that is not drained on purpose, or each of `only`, has a new process, and
    serves."""

    def progress(status: Status, asked: Asked) -> Progress:
        ranks = [r for r in status.ranks if r.desired and (not only or r.rank in only)]
        if gone := set(only) - {rank.rank for rank in ranks}:
            return _overtaken(f"not restarted: {names_of(gone)} shall not exist any more")
        drained = {rank.rank for rank in ranks if rank.after == STAY}
        if drained and only:
            return _overtaken(f"not restarted: {names_of(drained)} {_is(drained)} drained")
        old = {rank.rank for rank in ranks if not asked.has_new_process(rank)} - drained
        to_come = {*status.change.restart, *(r.rank for r in ranks if r.after == "restart")}
        if kept := old - to_come:
            return _overtaken(f"not restarted: {names_of(kept)} (the restart was stopped)")
        left = {step.rank for step in status.change.steps if step.kind in ("restart", "join")}
        left |= {rank.rank for rank in ranks if rank.state != "live"} - drained
        if left or old:
            return _waiting(status, left | old)
        what = names_of(only) if only else "every rank"
        apart = f"; {names_of(drained)} {_is(drained)} drained, and as before" if drained else ""
        return Progress(result=f"{what} has a new process, and serves{apart}")

    return progress


def restart_stopped(status: Status, asked: Asked) -> Progress:
    if status.change.restart:
        return _overtaken(f"{names_of(status.change.restart)} shall be restarted again")
    return Progress(result="no further restarts")


def verdicts(*, paused: bool) -> Goal:
    """Verdicts are paused, or given again."""

    def progress(status: Status, asked: Asked) -> Progress:
        if status.verdicts_paused is not paused:
            now = "given again" if paused else "paused again"
            return _overtaken(f"verdicts are {now}")
        if paused:
            return Progress(result="verdicts are paused until `starfish resume`")
        return Progress(result="verdicts are given again")

    return progress


def rebalanced(status: Status, asked: Asked) -> Progress:
    """Nothing is worth a move."""
    rebalance = status.rebalance
    if rebalance is None:  # an older control plane does not tell
        return Progress(result="the leader plans it; `starfish watch` shows the maps that follow")
    steps = f"{rebalance.num_steps} step{'' if rebalance.num_steps == 1 else 's'}"
    if rebalance.done < rebalance.asked:
        if rebalance.num_steps:
            return Progress(waits_for=(f"experts move: {steps} planned so far",))
        return Progress(waits_for=("the leader plans where experts are worth most",))
    if rebalance.num_steps:
        return Progress(result=f"experts were moved, in {steps}; nothing more is worth a move")
    return Progress(result="nothing was moved: no other placement is better")


def _overtaken(what: str) -> Progress:
    return Progress(result=f"{what} (somebody has changed the plan meanwhile)", failed=True)


def _is(ranks: Collection[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _waiting(status: Status, ranks: Collection[int]) -> Progress:
    texts = tuple(step.text for step in status.change.steps if step.rank in ranks)
    return Progress(waits_for=texts or ("the next map",))
