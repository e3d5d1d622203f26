"""The same for orchestrators, in the words of other servers. Names of fields and paths come from
vLLM (`/fault_tolerance/…`, `/scale_elastic_ep`, `/is_scaling_elastic_ep`) and SGLang (the last two:
`new_ep_size`, `effective_ep_size`, `pending_ep_size`, `scale_phase`, `last_error`); engines of
theirs are ranks of ours. Fields that we do not know are ignored, as they do."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from control_plane.admin.bodies import Rank, Ranks
from control_plane.admin.status import RankStatus, StatusAnswer
from control_plane.desired_changes import Change, DrainRanks, Scale
from shared.change_progress import StepKind
from shared.desired_state import GRACE_S_MAX, RANKS_MAX, AfterDrain
from shared.errors import RequestError
from shared.types import RankId

DRAIN_TIMEOUT_S = 120
"""vLLM's default."""
INSTRUCTIONS = ("scale_down", "retry")

Size = Annotated[int, Meta(ge=1, le=RANKS_MAX)]


class ScaleElasticEpBody(msgspec.Struct, kw_only=True):
    """`new_data_parallel_size` as vLLM has it: the answer comes when it is done. `new_ep_size` as
    SGLang has it: the answer comes at once. `drain_timeout`: seconds in which the sessions of ranks
    that go may finish where they are."""

    new_data_parallel_size: Size | None = None
    new_ep_size: Size | None = None
    drain_timeout: Annotated[float, Meta(gt=0, le=GRACE_S_MAX)] = DRAIN_TIMEOUT_S

    @property
    def size(self) -> int:
        """Raises RequestError."""
        given = [n for n in (self.new_data_parallel_size, self.new_ep_size) if n is not None]
        if len(given) != 1:
            raise RequestError(
                "pass new_data_parallel_size (or, as SGLang, new_ep_size)",
                param="new_data_parallel_size",
            )
        return given[0]

    @property
    def waits(self) -> bool:
        return self.new_data_parallel_size is not None

    def change(self) -> Change:
        """Raises RequestError."""
        return Scale(num_ranks=self.size, grace_s=self.drain_timeout)


class ScaledAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    message: str
    old_ep_size: int | None = None
    new_ep_size: int | None = None


class IsScalingAnswer(msgspec.Struct, kw_only=True):
    """`scale_phase` is "idle" at the size of the start, "serving_expanded" above and
    "serving_shrunk" below it, and meanwhile "waiting_for_cohort" or "draining"."""

    is_scaling_elastic_ep: bool
    effective_ep_size: int
    pending_ep_size: int | None
    scale_phase: str
    last_error: None = None


class ApplyParams(msgspec.Struct, kw_only=True):
    """`removed_dp_ranks`: of scale_down."""

    removed_dp_ranks: Ranks = ()
    drain_timeout: Annotated[float, Meta(gt=0, le=GRACE_S_MAX)] = DRAIN_TIMEOUT_S


class ApplyBody(msgspec.Struct, kw_only=True):
    """`instruction`: "scale_down" without the ranks `removed_dp_ranks`, or "retry", for which there
    is nothing to do: ranks come back by themselves. Without a `request_id` it gets one."""

    instruction: Annotated[str, Meta(max_length=64)]
    request_id: Annotated[str, Meta(max_length=128, pattern=r"^[!-~]*$")] = ""
    params: ApplyParams = msgspec.field(default_factory=ApplyParams)

    def change(self) -> Change | None:
        """None: there is nothing to change. Raises RequestError."""
        if self.instruction not in INSTRUCTIONS:
            raise RequestError(
                f"instruction {self.instruction!r}: pass one of {', '.join(INSTRUCTIONS)}",
                param="instruction",
            )
        if self.instruction == "retry":
            return None
        if not self.params.removed_dp_ranks:
            raise RequestError(
                "scale_down needs params.removed_dp_ranks", param="params.removed_dp_ranks"
            )
        ranks = tuple(RankId(rank) for rank in sorted(set(self.params.removed_dp_ranks)))
        return DrainRanks(ranks=ranks, grace_s=self.params.drain_timeout, after=AfterDrain.LEAVE)


class ApplyAnswer(msgspec.Struct, kw_only=True):
    message: str
    request_id: str


class EngineStatus(msgspec.Struct, kw_only=True):
    """`status`: "healthy" if it serves, "dead" if no process is registered, else "unhealthy"."""

    id: Rank
    status: str
    draining: bool
    safe_to_terminate: bool


class FaultToleranceAnswer(msgspec.Struct, kw_only=True):
    schema_version: int
    total_engines: int
    engines: tuple[EngineStatus, ...]


def fault_tolerance_of(status: StatusAnswer) -> FaultToleranceAnswer:
    engines = tuple(_engine(rank) for rank in status.ranks)
    return FaultToleranceAnswer(schema_version=1, total_engines=len(engines), engines=engines)


def _engine(rank: RankStatus) -> EngineStatus:
    words = {"live": "healthy", "draining": "healthy", "absent": "dead", "dead": "dead"}
    return EngineStatus(
        id=rank.rank,
        status=words.get(rank.state, "unhealthy"),
        draining=rank.drain is not None,
        safe_to_terminate=rank.safe_to_terminate,
    )


def is_scaled(status: StatusAnswer) -> bool:
    """Every rank that shall exist serves, or is drained on purpose, and the others are gone."""
    return all(
        (rank.state == "live" or (rank.drain is not None and rank.drain.after == "stay"))
        if rank.desired
        else not rank.in_map and rank.drain is None
        for rank in status.ranks
    )


def is_scaling_of(status: StatusAnswer, num_ranks_at_start: int) -> IsScalingAnswer:
    size = sum(rank.in_map for rank in status.ranks)
    desired = {rank.rank for rank in status.ranks if rank.desired}
    kinds = {
        step.kind
        for step in status.change.steps
        if step.kind is StepKind.JOIN or (step.kind is StepKind.LEAVE and step.rank not in desired)
    }
    if StepKind.JOIN in kinds:
        phase = "waiting_for_cohort"
    elif kinds:
        phase = "draining"
    elif size == num_ranks_at_start:
        phase = "idle"
    else:
        phase = "serving_expanded" if size > num_ranks_at_start else "serving_shrunk"
    return IsScalingAnswer(
        is_scaling_elastic_ep=bool(kinds),
        effective_ep_size=size,
        pending_ep_size=len(desired) if kinds else None,
        scale_phase=phase,
    )
