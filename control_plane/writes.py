"""What membership may decide: the fenced writes to etcd, and the one computation that is too long
for the event loop. How a write becomes a transaction is `publisher`'s."""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.placement import HealStep, heal
from shared.expert_map import ExpertMap
from shared.records import SlotContents, Verdict
from shared.types import NodeId, RankId


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishMap:
    """One transaction: the map, the verdicts on whom it leaves out, and new assignments."""

    expert_map: ExpertMap
    verdicts: tuple[Verdict, ...] = ()
    assignments: tuple[SlotContents, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclareDead:
    """Verdicts that no map can carry yet: too few are left to cover all experts, or survivors load
    what the dead held. A life that was judged dead and lives learns it by them, and makes room for
    one that a map can take; the others learn whom to wait for no longer."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Where orphans are to be loaded before a map can follow, together with the verdicts on those
    who held them: nobody waits for the dead meanwhile, and no slot in use is overwritten that a
    rank may still send tokens to for want of knowing."""

    assignments: tuple[SlotContents, ...]
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteKeys:
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanHeal:
    """No write: a computation too long for between two events. Its answer comes back by
    `on_heal_planned`; deaths are decided meanwhile."""

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


Write = PublishMap | DeclareDead | Assign | DeleteKeys
Decision = Write | PlanHeal
