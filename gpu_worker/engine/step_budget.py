"""How much more fits into the step that is being planned, and the chunks that are in it already."""

from __future__ import annotations

from gpu_worker.engine.projected_state import ProjectedState
from gpu_worker.engine.scheduler_limits import SchedulerLimits
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.step_plan import Chunk


class StepBudget:
    """For one plan. All decodes are added before the first prefill."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.chunks: list[Chunk] = []
        self._prefill_chunk_tokens = limits.prefill_chunk_tokens
        self._tokens_left = limits.step_tokens_max
        # The logits of a step are one matrix: rows times the vocabulary.
        self._scored_rows_left = limits.scored_rows_max

    @property
    def is_spent(self) -> bool:
        return self._tokens_left <= 0

    def add_decode(self, sequence: Sequence, projected: ProjectedState) -> None:
        self._add(Chunk(sequence, 1, projected))

    def add_prefill(self, sequence: Sequence, projected: ProjectedState) -> None:
        """Adds as many of its pending tokens as fit, which may be none."""
        num_tokens = min(projected.num_pending, self._prefill_chunk_tokens, self._tokens_left)
        if sequence.wants_prompt_logits:
            num_tokens = min(num_tokens, self._scored_rows_left)
        if num_tokens > 0:
            self._add(Chunk(sequence, num_tokens, projected))

    def _add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self._tokens_left -= chunk.num_tokens
        if chunk.sequence.wants_prompt_logits:
            self._scored_rows_left = max(0, self._scored_rows_left - chunk.num_tokens)
