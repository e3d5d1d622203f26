"""What membership may decide: fenced writes to etcd, and one computation that is too long for the
event loop. `publisher` turns a write into a transaction."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.cluster_state import ClusterState
from control_plane.placement import HealStep, heal
from shared.desired_state import DesiredState
from shared.expert_map import ExpertMap
from shared.records import SlotContents, Verdict
from shared.types import NodeId, ProcessState, RankId, SuspicionReason


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishMap:
    """One transaction: the map, the verdicts on the members that it leaves out, and assignments."""

    expert_map: ExpertMap
    verdicts: tuple[Verdict, ...] = ()
    assignments: tuple[SlotContents, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclareDead:
    """Verdicts before there is a map without the dead: too few ranks are left to hold all experts,
    or survivors are still loading what the dead held. An incarnation that was judged dead but is
    alive learns of it and restarts as a new one. The others learn for whom to wait no longer."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """What ranks are to load. After a death, the orphans, before a map can follow, together with
    the verdicts on the dead: nobody waits for the dead meanwhile, and every rank knows of the death
    before a slot is overwritten to which it might still send tokens."""

    assignments: tuple[SlotContents, ...]
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteKeys:
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishDesired:
    """The next desired state. Its transaction compares the revision of the one before."""

    desired: DesiredState
    cause: str  # in words, for the log


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanHeal:
    """No write, but a computation that is too long for the event loop. Its result comes back
    through `Membership.on_heal_planned`; deaths are decided meanwhile."""

    expert_map: ExpertMap
    map_revision: int
    nodes: dict[RankId, NodeId]
    budget_bytes: int
    bytes_per_expert: int
    redundant: int
    survive: int

    def first_step(self) -> HealStep | None:
        steps = heal(
            self.expert_map,
            None,
            self.nodes,
            budget_bytes=self.budget_bytes,
            bytes_per_expert=self.bytes_per_expert,
            redundant=self.redundant,
            survive=self.survive,
        )
        return next(iter(steps), None)


Write = PublishMap | DeclareDead | Assign | DeleteKeys | PublishDesired
Decision = Write | PlanHeal


def stopped_verdicts(
    write: PublishMap | DeclareDead | Assign, state: ClusterState
) -> list[Verdict]:
    """The verdicts that follow from the silence of a process that is stopped, as far as its node
    agent has said. If it says that the process goes on, they do not stand."""
    return [
        verdict
        for verdict in write.verdicts
        if verdict.cause is not SuspicionReason.EXIT
        and (view := state.views.get(verdict.member)) is not None
        and view.state is ProcessState.STOPPED
    ]
