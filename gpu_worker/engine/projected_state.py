"""How far a sequence is once the step in flight is committed, before that step's tokens are
known."""

from __future__ import annotations

from typing import NamedTuple

from gpu_worker.engine.sequence import Sequence

KNOWN = -1


class ProjectedState(NamedTuple):
    """How many tokens a sequence has, and how many of them are computed. If a step in flight
    samples the last token, `row` is that step's wanted row for it; else KNOWN."""

    num_tokens: int
    num_computed: int
    row: int = KNOWN

    @property
    def num_pending(self) -> int:
        return self.num_tokens - self.num_computed


def current_state(sequence: Sequence) -> ProjectedState:
    """With no step in flight."""
    return ProjectedState(len(sequence.tokens), sequence.num_computed)
