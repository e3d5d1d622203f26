"""Where sequences stand once the step in flight is committed, before its tokens are known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from gpu_worker.engine.sequence import Sequence

if TYPE_CHECKING:
    from gpu_worker.engine.step_plan import StepPlan

KNOWN = -1


class ProjectedState(NamedTuple):
    """How many tokens a sequence has, and how many of them are computed. Where a step in flight
    samples the last one, `row` is the one of that step's wanted rows that does; else KNOWN."""

    num_tokens: int
    num_computed: int
    row: int = KNOWN

    @property
    def num_pending(self) -> int:
        return self.num_tokens - self.num_computed


def current_state(sequence: Sequence) -> ProjectedState:
    """With no step in flight."""
    return ProjectedState(len(sequence.tokens), sequence.num_computed)


def projected_after(
    before: StepPlan, running: Iterable[Sequence]
) -> dict[Sequence, ProjectedState]:
    """Of those that go on, whatever the step samples, unless it is an end token."""
    chunks = {chunk.sequence: chunk for chunk in before.chunks}
    rows = {sequence: row for row, sequence in enumerate(before.sampled)}
    result: dict[Sequence, ProjectedState] = {}
    for sequence in running:
        if (chunk := chunks.get(sequence)) is None:
            result[sequence] = current_state(sequence)
            continue
        num_tokens = chunk.projected.num_tokens
        num_computed = chunk.projected.num_computed + chunk.num_tokens
        if (row := rows.get(sequence)) is None:
            result[sequence] = ProjectedState(num_tokens, num_computed)
        elif not sequence.is_full_at(num_tokens + 1):
            result[sequence] = ProjectedState(num_tokens + 1, num_computed, row)
    return result


def depends_on_tokens(before: StepPlan) -> bool:
    """Whether what comes after this step is not known before its tokens and scores are."""
    return bool(before.scored) or any(
        s.matcher is not None or s.token_counts is not None for s in before.sampled
    )
