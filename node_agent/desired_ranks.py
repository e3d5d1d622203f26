"""Which ranks this node shall run, and which of its processes are to end now, by what etcd holds.
Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from node_agent.serving_view import ServingView
from shared.desired_state import AfterDrain
from shared.types import Incarnation, NodeId, RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningProcess:
    """A process of ours, and the incarnations that it has gone through so far."""

    rank: RankId
    first: Incarnation
    newest: Incarnation


class Orders(NamedTuple):
    """`wanted`: what shall run here; what does not yet may be started. `ended`: processes of ranks
    that shall not run here any more. `restarted`: processes that another one is to replace."""

    wanted: frozenset[RankId]
    ended: tuple[RankId, ...]
    restarted: tuple[RankId, ...]


@dataclass(slots=True, kw_only=True)
class DesiredRanks:
    """If the desired state names no ranks, those of our flags are meant, and processes of others
    end at once. Otherwise a process that is to end serves until a map leaves it out: the control
    plane sees to that. `is_leaving`: the agent was told to end, so nothing shall run here."""

    node: NodeId
    flag_ranks: Collection[RankId]
    is_leaving: bool = False

    def orders(self, view: ServingView, running: Iterable[RunningProcess]) -> Orders | None:
        """None until all is known that etcd holds."""
        if not view.synced:
            return None
        processes = {process.rank: process for process in running}
        here = self._ranks_here(view)
        at_once = not view.desired.ranks and not self.is_leaving
        unwanted = [process for rank, process in processes.items() if rank not in here]
        replaced = [
            process
            for rank, process in processes.items()
            if rank in here and _is_to_restart(view, process)
        ]
        return Orders(
            wanted=frozenset(
                r for r in here if r in processes or not self._runs_elsewhere(view, r)
            ),
            ended=tuple(p.rank for p in unwanted if at_once or not _serves(view, p)),
            restarted=tuple(p.rank for p in replaced if not _serves(view, p)),
        )

    def is_alone(self, view: ServingView) -> bool:
        """Whether no rank of another node serves: then nobody can take over from ours."""
        others = {r.rank for r in view.records.values() if r.node != self.node}
        return others.isdisjoint(view.members)

    def _ranks_here(self, view: ServingView) -> frozenset[RankId]:
        if self.is_leaving:
            return frozenset()
        if not view.desired.ranks:
            return frozenset(self.flag_ranks)
        return frozenset(
            each.rank
            for each in view.desired.ranks
            if each.node == self.node or (not each.node and each.rank in self.flag_ranks)
        )

    def _runs_elsewhere(self, view: ServingView, rank: RankId) -> bool:
        """A second process of the rank would end the first."""
        return any(r.rank == rank and r.node != self.node for r in view.records.values())


def _serves(view: ServingView, process: RunningProcess) -> bool:
    """A planned map is adopted by all after the same step: who is not in it steps with the others
    until then, and has its record so long."""
    incarnation = view.members.get(process.rank)
    if incarnation is None:
        incarnation = view.former_members.get(process.rank)
        if not any(
            r.rank == process.rank and r.incarnation == incarnation for r in view.records.values()
        ):
            return False
    return incarnation is not None and process.first <= incarnation <= process.newest


def _is_to_restart(view: ServingView, process: RunningProcess) -> bool:
    drain = view.desired.drain_of(process.rank)
    return (
        drain is not None
        and drain.after is AfterDrain.RESTART
        and process.first <= drain.incarnation
    )
