"""How much more fits into the step that is being planned, and the chunks that are in it already."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items

from gpu_worker.engine.projected_state import ProjectedState
from gpu_worker.engine.scheduler_limits import NO_LIMIT, SchedulerLimits
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.step_plan import Chunk
from gpu_worker.engine.step_shares import Decode, StepShares

_CONTEXT_TOKENS = 4096
"""After so many positions, attention takes as long as the rest of a prompt token's arithmetic."""


class StepBudget:
    """For one plan. All decodes are added before the first prefill. `shares` has begun this step.

    A step with decodes takes only so much prefill that they do not wait much longer than usual:
    `mixed_prefill_tokens` of the beginning of a prompt, or fewer of a later part. What a death made
    this rank compute again may take all of it: its clients have waited already.
    """

    def __init__(self, limits: SchedulerLimits, shares: StepShares) -> None:
        self._shares = shares
        self.chunks: list[Chunk] = []
        self._prefill_chunk_tokens = limits.prefill_chunk_tokens
        self._tokens_left = limits.step_tokens_max
        self._rows_left = limits.step_sequences_max
        self._mixed_left = limits.mixed_prefill_tokens
        self._has_decodes = False
        self._also_prefill: Collection[str] = ()
        self._drafts_left = 0
        # The logits of a step are one matrix: rows times the vocabulary.
        self._scored_rows_left = limits.scored_rows_max

    @property
    def is_spent(self) -> bool:
        is_mixed_spent = self._has_decodes and self._mixed_left <= 0
        return self._tokens_left <= 0 or self._rows_left <= 0 or is_mixed_spent

    def has_left(self, sequence: Sequence) -> bool:
        """Whether its tenant may have more of this step."""
        return self._prefill_left(sequence) > 0

    def add_decodes(self, wanted: Items[Decode], also_prefill: Collection[str]) -> None:
        """As many as each tenant may have. Tenants of `also_prefill` have prompts to compute."""
        self._also_prefill = also_prefill
        for sequence, projected in self._shares.decodes(wanted, also_prefill):
            self._has_decodes = True
            self._add(Chunk(sequence, 1, projected))
        self._drafts_left = min(self._tokens_left, self._rows_left) // 2

    def add_drafts(self, index: int, drafts: tuple[int, ...]) -> bool:
        """Lets the decode `chunks[index]` verify these as well, if nobody else loses by it: not if
        its tenant's prompts wait for their part of the step, and in half of what decodes leave.
        Returns whether it does."""
        chunk, count = self.chunks[index], len(drafts)
        sequence = chunk.sequence
        left = self._shares.left(sequence)
        is_held_back = left < NO_LIMIT and sequence.scheduling.tenant in self._also_prefill
        if is_held_back or count > min(left, self._drafts_left):
            return False
        self.chunks[index] = chunk._replace(num_tokens=chunk.num_tokens + count, drafts=drafts)
        self._drafts_left -= count
        self._tokens_left -= count
        self._rows_left -= count
        self._shares.take(sequence, count)
        return True

    def add_prefill(self, sequence: Sequence, projected: ProjectedState) -> None:
        """Adds as many of its pending tokens as fit, which may be none."""
        num_tokens = min(projected.num_pending, self._prefill_chunk_tokens, self._tokens_left)
        if self._has_decodes and not sequence.num_emitted:
            num_tokens = min(num_tokens, self._mixed_tokens(projected))
        num_tokens = min(num_tokens, self._prefill_left(sequence))
        if sequence.wants_prompt_logits:
            num_tokens = min(num_tokens, self._scored_rows_left, self._rows_left)
        if num_tokens > 0 and self._rows_left > 0:
            self._add(Chunk(sequence, num_tokens, projected))
            if not sequence.num_emitted:
                self._shares.take(sequence, num_tokens)
                self._mixed_left -= num_tokens * _cost(projected) // _CONTEXT_TOKENS
            if num_tokens == projected.num_pending and sequence.samples:
                self._shares.take_draw(sequence)

    def _prefill_left(self, sequence: Sequence) -> int:
        """What a death makes this rank compute again is not the tenant's doing."""
        if sequence.num_emitted:
            return NO_LIMIT
        # Which chunk is its last is not known before its blocks are.
        return self._shares.left(sequence) if self._shares.may_draw(sequence) else 0

    def _mixed_tokens(self, projected: ProjectedState) -> int:
        """How many of the sequence's next tokens fit beside decodes."""
        if self._mixed_left <= 0:
            return 0
        return max(1, self._mixed_left * _CONTEXT_TOKENS // _cost(projected))

    def _add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self._tokens_left -= chunk.num_tokens
        if chunk.sequence.wants_prompt_logits:
            self._scored_rows_left = max(0, self._scored_rows_left - chunk.num_tokens)
            self._rows_left -= chunk.num_tokens
        else:
            self._rows_left -= 1


def _cost(projected: ProjectedState) -> int:
    """Of one prompt token; `_CONTEXT_TOKENS` at the beginning of a prompt."""
    return _CONTEXT_TOKENS + projected.num_computed
