"""What is still to be done of the changes that people asked for, in words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec

from shared.desired_state import AfterDrain, DesiredState, Drain
from shared.expert_map import ExpertMap
from shared.records import AgentRecord, RankRecord, Verdict
from shared.types import ABSENT_SLOT, Member, RankId, RankState, SuspicionReason


class StepKind(Enum):
    """RECOVER is no part of a change: a rank has died, and comes back by itself."""

    DRAIN = "drain"
    LEAVE = "leave"
    RESTART = "restart"
    JOIN = "join"
    RECOVER = "recover"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not done yet. `text` says what it waits for."""

    kind: StepKind
    rank: RankId
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What etcd holds, and what ranks say. `sessions_of` tells how many sessions a member has,
    running and waiting, or None if nobody knows. `num_ranks` is the spec's."""

    num_ranks: int
    desired: DesiredState
    expert_map: ExpertMap | None
    records: Mapping[Member, RankRecord]
    verdicts: Collection[Verdict]
    sessions_of: Callable[[Member], int | None]
    agents: Collection[AgentRecord] = ()

    def member_of(self, rank: RankId) -> Member | None:
        """The incarnation of the rank that the map names."""
        if self.expert_map is None:
            return None
        incarnation = self.expert_map.incarnation_of(rank)
        return None if incarnation is None else Member(rank=rank, incarnation=incarnation)

    def sessions_left(self, rank: RankId) -> int | None:
        """None if it is no member or nobody knows."""
        member = self.member_of(rank)
        return None if member is None else self.sessions_of(member)

    def is_safe_to_terminate(self, rank: RankId) -> bool:
        """Whether its process, or its host, may be ended now without anybody's noticing."""
        return self.desired.drain_of(rank) is not None and self.member_of(rank) is None

    def steps(self, now: float) -> tuple[Step, ...]:
        """By rank. `now` is in Unix seconds. None if everything is as it shall be."""
        return _Progress(self, now).steps()


def is_in_progress(steps: Iterable[Step]) -> bool:
    """Whether a change that somebody asked for is not done yet."""
    return any(step.kind is not StepKind.RECOVER for step in steps)


class _Progress:
    def __init__(self, seen: Seen, now: float) -> None:
        self._seen = seen
        self._now = now
        self._records = {member.rank: seen.records[member] for member in sorted(seen.records)}

    def steps(self) -> tuple[Step, ...]:
        seen, desired = self._seen, self._seen.desired
        found = [step for drain in desired.drains if (step := self._of_drain(drain))]
        drained = {drain.rank for drain in desired.drains}
        absent = [
            rank
            for rank in desired.rank_ids(seen.num_ranks)
            if rank not in drained and seen.member_of(rank) is None
        ]
        found += self._of_restart(absent)
        found += [self._of_absent(rank) for rank in absent]
        return tuple(sorted(found, key=lambda step: step.rank))

    def _of_restart(self, absent: Sequence[RankId]) -> list[Step]:
        """Of the ranks that wait for their turn in a rolling restart."""
        restart, drains = self._seen.desired.restart, self._seen.desired.drains
        drained = {drain.rank for drain in drains}
        left = [r for r in (restart.ranks if restart is not None else ()) if r not in drained]
        under_way = [drain.rank for drain in drains if drain.after is not AfterDrain.STAY]
        before = [*under_way, *absent]
        steps = []
        for rank in left:
            others = [other for other in before if other != rank]
            why = f"after rank {others[-1]}" if others else self._why_not_now(rank)
            text = f"rank {rank} waits for its restart: {why}"
            steps.append(Step(kind=StepKind.RESTART, rank=rank, text=text))
            before.append(rank)
        return steps

    def _why_not_now(self, rank: RankId) -> str:
        """Of the next one, if all ranks serve."""
        expert_map = self._seen.expert_map
        if expert_map is not None:
            drained = {drain.rank for drain in self._seen.desired.drains}
            others = [m.rank for m in expert_map.members if m.rank not in {rank, *drained}]
            slots = int((expert_map.placement[0, others] != ABSENT_SLOT).sum())
            if slots < expert_map.num_experts:
                return (
                    f"the others have {slots} slots in each layer for {expert_map.num_experts} "
                    "experts; add a rank, or `starfish restart --stop`"
                )
        return "its turn is next, once no expert moves"

    def _of_drain(self, drain: Drain) -> Step | None:
        rank, is_member = drain.rank, self._seen.member_of(drain.rank) is not None
        kind = {
            AfterDrain.STAY: StepKind.DRAIN,
            AfterDrain.RESTART: StepKind.RESTART,
            AfterDrain.LEAVE: StepKind.LEAVE,
        }[drain.after]
        if is_member:
            return Step(kind=kind, rank=rank, text=f"rank {rank} {self._serving_yet(drain)}")
        match drain.after:
            case AfterDrain.STAY:
                return None
            case AfterDrain.RESTART if rank not in self._records:
                text = f"rank {rank} {self._without_process(rank)}"
            case AfterDrain.RESTART:
                text = f"rank {rank} serves nobody and gets a new process"
            case AfterDrain.LEAVE:
                node = self._seen.desired.node_of(rank)
                then = f"; then it starts on {node}" if node else ""
                text = f"rank {rank} serves nobody, its process ends{then}"
        return Step(kind=kind, rank=rank, text=text)

    def _serving_yet(self, drain: Drain) -> str:
        num = self._seen.sessions_left(drain.rank)
        if num == 0:
            return "has no sessions left; its experts get another place before it leaves the map"
        sessions = "sessions" if num is None else f"{num} session{'' if num == 1 else 's'}"
        left_s = drain.requested_at + drain.grace_s - self._now
        if left_s > 0:
            return f"has {sessions} left, which may finish there for {left_s:.0f} s"
        return f"has {sessions} left, which move to other ranks"

    def _of_absent(self, rank: RankId) -> Step:
        record = self._records.get(rank)
        kind = StepKind.RECOVER if self._has_died(rank) else StepKind.JOIN
        return Step(kind=kind, rank=rank, text=f"rank {rank} {self._coming(rank, record)}")

    def _coming(self, rank: RankId, record: RankRecord | None) -> str:
        if record is None:
            return self._without_process(rank)
        if record.state is RankState.STARTING:
            return "loads its experts"
        return "has loaded its experts and waits for its links and the next map"

    def _without_process(self, rank: RankId) -> str:
        node, agents = self._seen.desired.node_of(rank), self._seen.agents
        hosts = [a for a in agents if (a.node == node if node else rank in a.ranks)]
        if not hosts:
            where = f"on {node}" if node else f"with {rank} in its --ranks"
            return f"has no process: no node agent runs {where}; start one"
        if all(agent.leaving for agent in hosts):
            return f"has no process: the node agent on {hosts[0].node} was told to end"
        for agent in hosts:
            for waiting in agent.waiting:
                if waiting.rank == rank:
                    left_s = waiting.until - self._now
                    again = f"starts again in {left_s:.0f} s" if left_s > 0 else "starts again"
                    return f"{again} on {agent.node}: {waiting.why}"
        return f"has not registered yet (on {hosts[0].node})"

    def _has_died(self, rank: RankId) -> bool:
        verdicts = [verdict for verdict in self._seen.verdicts if verdict.rank == rank]
        newest = max(verdicts, key=lambda verdict: verdict.incarnation, default=None)
        return newest is not None and newest.cause is not SuspicionReason.DRAINED
