"""How much one rank's scheduler may hold and run, and the check of new sequences against these
limits."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.engine.sequence import Sequence
from shared.wire import SessionTokens

NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """`kv_blocks` times `kv_block_tokens` is the KV cache. A session ends with LENGTH when prompt
    and generated tokens reach `context_tokens_max`, or the whole cache. `waiting_max` bounds new
    sessions and continued ones separately, so that many new ones never refuse a client who is in
    mid-stream. `running_max` bounds how many run when new ones are admitted; sessions in
    mid-stream, and new ones of a tenant that was served less than others, run up to
    `mid_stream_max`. `orphans_max` bounds the sessions that go on without a gateway."""

    vocab_size: int
    context_tokens_max: int
    kv_blocks: int
    kv_block_tokens: int
    step_tokens_max: int
    prefill_chunk_tokens: int
    running_max: int
    waiting_max: int
    step_sequences_max: int = NO_LIMIT  # in one step; also its wanted rows of logits
    mixed_prefill_tokens: int = NO_LIMIT  # in a step with decodes: see `step_budget`
    tenant_step_tokens: int = NO_LIMIT  # of one tenant in a step of several: see `step_shares`
    tenant_host_rows: int = NO_LIMIT  # as well, of those whose tokens the host draws
    prefix_cache: bool = True
    orphans_max: int = 256
    scored_logits_max: int = 1 << 24  # prompt rows of one step times the vocabulary
    restored_blocks_enough: int = 64  # in one plan; on CPUs some 10 ms

    @property
    def scored_rows_max(self) -> int:
        return max(1, self.scored_logits_max // self.vocab_size)

    @property
    def mid_stream_max(self) -> int:
        """Most sequences that run when one in mid-stream is admitted: as many as can decode in one
        step. Beyond `running_max` steps are longer than they should be, but nobody who has read
        half an answer waits for another's whole answer."""
        return max(self.running_max, min(self.step_tokens_max, self.step_sequences_max))

    @property
    def tokens_max(self) -> int:
        return min(self.context_tokens_max, self.kv_blocks * self.kv_block_tokens)


def reply_at_once(sequence: Sequence, limits: SchedulerLimits) -> SessionTokens | None:
    """The reply to a new sequence that never runs: it is invalid, too long, or has nothing left to
    generate. None: it may run."""
    index = sequence.next_index
    if not sequence.tokens:
        return sequence.reply(index=index, error="the prompt has no tokens")
    if max(sequence.tokens) >= limits.vocab_size or min(sequence.tokens) < 0:
        error = f"the prompt has token ids outside of 0 … {limits.vocab_size - 1}"
        return sequence.reply(index=index, error=error)
    num_wanted = len(sequence.tokens) + (1 if sequence.samples else 0)
    if sequence.num_emitted == 0 and num_wanted > limits.tokens_max:
        error = (
            f"the prompt has {len(sequence.tokens)} tokens, but this model serves at most "
            f"{limits.tokens_max} tokens of prompt and completion together"
        )
        return sequence.reply(index=index, error=error)
    if (finish := sequence.finish_if_full()) is not None:
        return sequence.reply(index=index, finish=finish)
    return None
