"""Decides which sequences run in the next step, and what a committed step means for them:
continuous batching with chunked prefill over a paged KV cache. Pure: no clock, no I/O,
deterministic.

Theory of operation. A sequence waits, runs, ends. To run it needs KV blocks for all its known
tokens. Its prefill is cut into chunks; once all known tokens are computed, each step makes one more
token. A plan changes little, so that its step may fail: tokens, and the `num_computed` of running
sequences, change in `commit` alone, and `abandon` takes back blocks and admissions. Only two things
stay: a preemption, and the loss of names of blocks that were handed out again (the failed step may
have written into them). They cost work, never tokens. Restored blocks stay as well.

    event               waiting               running                     unknown here
    submit, later       replaced              replaced                    compiles, waits, ended,
                                                                          or refused
    submit, no later    ignored               ignored                     –
    take over           goes on for another   goes on for another         an ended orphan's tokens
    cancel, drop        ended                 ended, blocks freed         nothing
    orphan              goes on, or ended     goes on, or ended           –
    plan                runs, if it fits, and decodes or prefills a part, –
                        begins with what      or is preempted → waits
                        cache and replicas
                        have of it
    commit              –                     one token more, or as many  –
                                              as drafts were right, or
                                              ended;
                                              full blocks are published
                                              and offered for replication
    abandon             –                     as before the plan;         –
                                              admitted in it → waits

A sequence that a grammar guides first has it compiled (COMPILING), then waits like others. While
the mask of its next token is computed, it is *held* (`guided_sequences`): it keeps its blocks, and
steps go on without it. A grammar that cannot be followed ends its sequence, in `settle_grammars`.

A step may be planned while the one before is in flight (`plan_ahead`): if a sequence samples in
that one, its next token is known by its place alone. Nothing is planned this way that depends on
such a token (a grammar, a penalty) or takes a running sequence's blocks. A sequence that ends
meanwhile is skipped when the later plan is committed or abandoned. Its blocks may be handed out at
once, because steps run in the order of their plans.

When blocks run out, the last of those that run gives up its own: of the lowest priority, of the
tenant that runs most, the latest. It is recomputed later from all its known tokens, less what the
cache still has of them. A sequence needs a further block only after it has made a token, and what
runs alone always fits: so between two preemptions somebody makes a token, and every sequence ends.

A sequence whose client has tokens is *in mid-stream*: its rank died, or it was preempted. It never
waits for a whole answer of another because too many run: it may exceed `running_max`. Nor does it
wait for KV blocks while a sequence runs whose client has seen nothing; that one gives up its own.

A sequence whose gateway is gone, or whose client has come back through another, goes on and may be
taken over: `resumable_streams`.

Who is next among several tenants: `tenant_shares`, `waiting_queue`; how much of a step each of them
may have: `step_shares`. What a sequence begins with, and for whose blocks it waits:
`sequence_blocks`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Items
from typing import NamedTuple

from msgspec.structs import replace

from gpu_worker.engine.drafting import add_drafts, counted_rows
from gpu_worker.engine.grammar_matcher import Grammars
from gpu_worker.engine.guided_sequences import GuidedSequences
from gpu_worker.engine.kv_blocks import KvBlocks
from gpu_worker.engine.kv_replication import KvReplicator
from gpu_worker.engine.logprobs import StepScores
from gpu_worker.engine.no_kv_replication import NoKvReplication
from gpu_worker.engine.projected_state import ProjectedState, current_state
from gpu_worker.engine.resumable_streams import ResumableStreams, missed_tokens
from gpu_worker.engine.sampler import NO_TOKEN
from gpu_worker.engine.scheduler_limits import SchedulerLimits, reply_at_once
from gpu_worker.engine.sequence import Origin, Sequence, SequenceState
from gpu_worker.engine.sequence_blocks import SequenceBlocks
from gpu_worker.engine.step_budget import StepBudget
from gpu_worker.engine.step_plan import (
    NO_DRAFT,
    NO_DRAFTS,
    ScoredRows,
    StepPlan,
    build_plan,
    depends_on_tokens,
    projected_after,
)
from gpu_worker.engine.step_shares import StepShares
from gpu_worker.engine.tenant_shares import TenantShares
from gpu_worker.engine.waiting_queue import WaitingQueue
from shared.errors import GrammarError
from shared.types import Attempt, FinishReason, SessionId
from shared.wire import Load, SessionTokens, Submit, TokenLogprob


class Committed(NamedTuple):
    replies: dict[Origin, list[SessionTokens]]
    num_generated: int
    num_reprefilled: int  # given tokens of continued sessions that were prefilled
    num_drafted: int = 0  # drafts that were verified
    num_accepted: int = 0  # those that were right


class Scheduler:
    """After `plan` comes at most one `plan_ahead`. Plans are committed in their order. If one is
    abandoned, the later one is abandoned first."""

    def __init__(
        self,
        limits: SchedulerLimits,
        eos_token_ids: tuple[int, ...],
        grammars: Grammars | None = None,
        replicator: KvReplicator | None = None,
    ) -> None:
        self._limits = limits
        self._guided = GuidedSequences(grammars)
        self._eos_token_ids = eos_token_ids
        self._kv = KvBlocks(
            num_blocks=limits.kv_blocks,
            block_tokens=limits.kv_block_tokens,
            rows_max=limits.mid_stream_max,
            row_blocks_max=-(-limits.tokens_max // limits.kv_block_tokens),
        )
        self._replicator = replicator or NoKvReplication()
        self._blocks = SequenceBlocks(self._kv, self._replicator, is_shared=limits.prefix_cache)
        self._sequences: dict[SessionId, Sequence] = {}
        self._streams = ResumableStreams(limits.orphans_max)
        self._shares = TenantShares()
        self._step_shares = StepShares(limits.tenant_step_tokens, host_rows=limits.tenant_host_rows)
        self.tenants_elsewhere: Collection[str] = ()
        """Tenants that have sessions in flight, on this rank or others; set before `plan`."""
        self._waiting = WaitingQueue(self._shares)
        self._running: list[Sequence] = []  # sorted when a plan begins: the last is preempted first
        self._num_tokens = 0
        self._arrivals = 0
        self._plans: deque[StepPlan] = deque()  # neither committed nor abandoned

    @property
    def has_work(self) -> bool:
        return len(self._sequences) > len(self._guided)

    @property
    def num_restored(self) -> int:
        """Blocks that were filled from replicas since the start."""
        return self._blocks.num_restored

    def learn_draws(self, *, num_rows: int, drawn_s: float, step_s: float) -> None:
        """See `DrawCosts.learn`."""
        self._step_shares.draw_costs.learn(num_rows=num_rows, drawn_s=drawn_s, step_s=step_s)

    def load(self) -> Load:
        return Load(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._guided.compiling),
            tokens=self._num_tokens,
            kv_blocks_free=self._kv.num_free,
            kv_blocks=self._kv.num_blocks,
            kv_blocks_cached=self._kv.num_named,
            prefix_tokens=self._blocks.num_prefix_tokens,
            prefix_tokens_cached=self._blocks.num_prefix_cached,
            kv_replicas_rejected=self._replicator.num_rejected,
        )

    def submit(self, origin: Origin, submit: Submit, now: float = 0.0) -> SessionTokens | None:
        """The reply if the attempt ends at once: refused, or nothing left to generate. `now`, here
        and when a plan is made, is in seconds of one clock; it only measures the wait."""
        known = self._sequences.get(submit.session)
        if known is not None:
            if submit.attempt <= known.attempt:
                return None
            self._end(known)
        self._arrivals += 1
        sequence = Sequence(
            submit,
            origin=origin,
            arrival=self._arrivals,
            eos_token_ids=self._eos_token_ids,
            tokens_max=self._limits.tokens_max,
            now=now,
        )
        reply = reply_at_once(sequence, self._limits) or self._refuse_if_full(sequence)
        if reply is not None:
            return reply
        if submit.sampling.grammar:
            try:
                self._guided.open(sequence)
            except GrammarError as error:
                return sequence.reply(index=sequence.next_index, error=str(error))
            sequence.state = SequenceState.COMPILING
        self._sequences[sequence.session] = sequence
        self._streams.add(sequence)
        self._num_tokens += len(sequence.tokens)
        self._shares.enter(sequence)
        if sequence.state is SequenceState.WAITING:
            self._waiting.add(sequence)
        return None

    def take_over(
        self, origin: Origin, submit: Submit
    ) -> list[tuple[Origin, SessionTokens]] | None:
        """The replies if a sequence that is here becomes that of this attempt: its tokens so far,
        and to the gateway that had it that it is gone. None if there is no such sequence."""
        found = self._streams.find(submit)
        if found is None:
            return None
        replies: list[tuple[Origin, SessionTokens]] = []
        if found.state is not SequenceState.ENDED:
            if not self._streams.is_orphan(found):
                error = "its client has gone on with this stream over another connection"
                replies.append((found.origin, found.reply(index=found.next_index, error=error)))
            self._rename(found, submit.session)
            found.origin = origin
            found.attempt = submit.attempt
        finish = self._streams.take(found)
        return [*replies, (origin, missed_tokens(found, submit, finish))]

    def settle_grammars(self, *, wait: bool) -> dict[Origin, list[SessionTokens]]:
        """Lets go on whose grammar or mask has become known. Returns the replies to sessions that
        it has ended. `wait`: a mask that is due at once is given a moment."""
        if not self._guided:
            return {}
        if wait:
            self._guided.wait()
        settled = self._guided.settle()
        for sequence in settled.compiled:
            sequence.state = SequenceState.WAITING
            self._waiting.add(sequence)
        replies: dict[Origin, list[SessionTokens]] = {}
        for sequence, error in settled.failed:
            self._end(sequence)
            reply = sequence.reply(index=sequence.next_index, error=error)
            replies.setdefault(sequence.origin, []).append(replace(reply, invalid=True))
        return replies

    def cancel(self, session: SessionId, attempt: Attempt) -> tuple[Origin, SessionTokens] | None:
        """Ends this attempt, or an earlier one that is still here. Returns the reply and the origin
        to send it to; None if there is no such attempt."""
        sequence = self._sequences.get(session)
        if sequence is None or sequence.attempt > attempt:
            return None
        self._end(sequence)
        reply = sequence.reply(index=sequence.next_index, finish=FinishReason.CANCELLED)
        return sequence.origin, reply

    def drop_origin(self, origin: Origin) -> None:
        """Ends its sessions without replies: its connection is gone."""
        for sequence in [s for s in self._sequences.values() if s.origin == origin]:
            self._end(sequence)
        self._streams.drop(origin)

    def orphan_origin(self, origin: Origin) -> None:
        """Its connection is gone. Those of its sessions that another gateway may take over go on
        until `drop_origin`; the others end without replies."""
        orphans = [s for s in self._sequences.values() if s.origin == origin]
        for sequence in self._streams.orphan(orphans):
            if sequence.state is not SequenceState.ENDED:
                self._end(sequence)

    def plan(self, now: float = 0.0) -> StepPlan:
        """Takes decodes first, then prefill chunks of running sequences, then of newly admitted
        ones, unless these are ahead of the running ones. If blocks run out, the last of
        the running ones are preempted."""
        assert not self._plans, "a plan is in flight"
        self._shares.sort_running(self._running)
        projected = {s: current_state(s) for s in self._running}
        while len(growing := self._growing(projected)) > self._kv.num_free or self._has_to_yield(
            growing
        ):
            preempted = self._running.pop()
            del projected[preempted]
            self._stop_running(preempted)
        return self._fill_step(projected, growing, now)

    def plan_nothing(self) -> StepPlan:
        """A step without tokens."""
        assert not self._plans, "a plan is in flight"
        plan = build_plan((), self._kv, grown=(), admitted=())
        self._plans.append(plan)
        return plan

    def plan_ahead(self, now: float = 0.0) -> StepPlan | None:
        """The step after the one in flight, before that one's tokens are known. None if the plan
        depends on them, or if there is nothing to run."""
        (before,) = self._plans
        if depends_on_tokens(before):
            return None
        self._shares.sort_running(self._running)
        projected = projected_after(before, self._running)
        growing = self._growing(projected)
        if len(growing) > self._kv.num_free or self._has_to_yield(growing):
            return None
        plan = self._fill_step(projected, growing, now)
        if not plan.chunks:
            self.abandon(plan)
            return None
        return plan

    def _growing(self, projected: Mapping[Sequence, ProjectedState]) -> list[Sequence]:
        """Those that need one block more for their next token."""
        return [
            s
            for s, state in projected.items()
            if state.num_tokens > self._kv.capacity_tokens(s.row)
        ]

    def _has_to_yield(self, growing: Items[Sequence]) -> bool:
        """Whether the last of the running sequences, whose client has seen nothing, has what
        a waiting one in mid-stream needs. `growing` take a block each before that one does."""
        first = self._waiting.first()
        if first is None or not self._running:
            return False
        last = self._running[-1]
        if not _is_in_mid_stream(first) or _is_in_mid_stream(last):
            return False
        num_wanted = len(self._running) + len(growing) + self._blocks.num_needed(first)
        return len(self._running) >= self._limits.mid_stream_max or num_wanted > self._kv.num_free

    def _fill_step(
        self, projected: Mapping[Sequence, ProjectedState], growing: Items[Sequence], now: float
    ) -> StepPlan:
        """`projected` are the running sequences, in order of priority."""
        for sequence in growing:
            self._kv.extend(sequence.row, 1)
        able = [each for each in projected.items() if not self._guided.holds(each[0])]
        decoding = [(s, state) for s, state in able if state.num_pending == 1]
        prefilling = deque(self._shares.in_order(s for s, state in able if state.num_pending > 1))
        self._step_shares.begin((s for s, _ in decoding), self.tenants_elsewhere)
        budget = StepBudget(self._limits, self._step_shares)
        prompts = [*prefilling, *self._waiting.heads()]
        budget.add_decodes(decoding, {s.scheduling.tenant for s in prompts})
        grown = [*growing, *add_drafts(budget, self._kv, num_running=len(self._running))]
        admitted: list[Sequence] = []
        restored_max = self.num_restored + self._limits.restored_blocks_enough
        while not budget.is_spent:
            while prefilling and not budget.has_left(prefilling[0]):
                prefilling.popleft()
            found = self._next_admissible(budget) if self.num_restored < restored_max else None
            if prefilling and (found is None or not self._shares.is_ahead(found, prefilling[0])):
                sequence = prefilling.popleft()
                budget.add_prefill(sequence, projected[sequence])
            elif found is not None:
                self._admit(found)
                found.begin(now)
                admitted.append(found)
                budget.add_prefill(found, current_state(found))
            else:
                break
        plan = build_plan(budget.chunks, self._kv, grown=grown, admitted=admitted)
        self._plans.append(plan)
        return plan

    def commit(
        self,
        plan: StepPlan,
        sampled_ids: Items[int],
        scores: StepScores | None = None,
        drafts: Mapping[int, int] = NO_DRAFTS,
    ) -> Committed:
        """The step took place. `sampled_ids` are the tokens of its wanted rows, `scores` the
        log-probabilities that were requested, and `drafts` the guesses of what follows the token of
        a wanted row."""
        first = self._plans.popleft()
        assert plan is first, "an earlier plan is in flight"
        num_reprefilled = num_generated = num_drafted = num_accepted = 0
        for sequence in plan.admitted:
            self._blocks.count_begun(sequence)
            self._shares.confirm(sequence)
        self._shares.charge_tokens(plan.sampled)
        for chunk in plan.chunks:
            sequence, num_tokens = chunk.sequence, chunk.num_tokens - len(chunk.drafts)
            num_drafted += len(chunk.drafts)
            if sequence.state is not SequenceState.RUNNING:  # ended while the step was in flight
                continue
            if sequence.num_emitted:
                left = sequence.num_given - sequence.num_computed
                num_reprefilled += min(max(left, 0), num_tokens)
            sequence.num_computed += num_tokens
            sequence.drafts = ()
            self._blocks.publish(sequence)
        replies: dict[Origin, list[SessionTokens]] = {}
        for rows, logprobs in zip(plan.scored, scores.prompt if scores else (), strict=True):
            if rows.sequence.state is not SequenceState.RUNNING:
                continue
            reply = self._take_prompt_scores(rows, logprobs)
            replies.setdefault(rows.sequence.origin, []).append(reply)
        of_sampled = scores.sampled if scores else ((),) * len(plan.sampled)
        counted = counted_rows(plan, sampled_ids)
        tokens: dict[Sequence, SessionTokens] = {}
        for row, token in enumerate(sampled_ids):
            sequence = plan.sampled[row]
            # Its prompt's scores may have failed, or the token before have been its last.
            if not counted[row] or sequence.state is not SequenceState.RUNNING:
                continue
            if plan.follows[row] != NO_DRAFT:
                num_accepted += 1
                sequence.num_computed += 1
                self._blocks.publish(sequence)
            num_generated += 1
            reply = self._take_token(sequence, token, of_sampled[row])
            tokens[sequence] = _joined(tokens[sequence], reply) if sequence in tokens else reply
            if row in drafts and sequence.state is SequenceState.RUNNING:
                sequence.drafts = (drafts[row],)
        for sequence, reply in tokens.items():
            replies.setdefault(sequence.origin, []).append(reply)
        for chunk in plan.chunks:
            self._blocks.offer(chunk.sequence)
        return Committed(replies, num_generated, num_reprefilled, num_drafted, num_accepted)

    def abandon(self, plan: StepPlan) -> None:
        """The step did not take place."""
        last = self._plans.pop()
        assert plan is last, "a later plan is in flight"
        for sequence in plan.grown:
            if sequence.state is SequenceState.RUNNING:
                self._kv.shrink(sequence.row, 1)
        for sequence in plan.admitted:
            if sequence.state is SequenceState.RUNNING:
                self._running.remove(sequence)
                self._shares.take_back(sequence)
                self._stop_running(sequence)

    def _refuse_if_full(self, sequence: Sequence) -> SessionTokens | None:
        if self._waiting.has_room_for(
            sequence, self._limits.waiting_max, compiling=self._guided.compiling
        ):
            return None
        error = "the waiting queue of this rank is full"
        return replace(sequence.reply(index=sequence.next_index, error=error), retryable=True)

    def _next_admissible(self, budget: StepBudget) -> Sequence | None:
        """The first waiting sequence, except those that wait for a block of another, and those of
        tenants that run enough, or have enough of this step. Besides blocks for all its known
        tokens, one must be free for each running sequence to grow: else it would soon be
        preempted."""
        num_reserved = len(self._running)
        heads = self._waiting.heads()
        have_enough = {s.scheduling.tenant for s in heads if not budget.has_left(s)}
        for sequence in self._waiting.in_order(have_enough):
            if not self._may_run_one_more(sequence):
                have_enough.add(sequence.scheduling.tenant)
                continue
            num_reserved += self._blocks.num_needed(sequence)
            if num_reserved > self._kv.num_free:
                return None
            if not self._blocks.awaits_another(sequence, self._running) and not self._guided.holds(
                sequence
            ):
                return sequence
        return None

    def _may_run_one_more(self, sequence: Sequence) -> bool:
        limits, num_running = self._limits, len(self._running)
        if num_running < limits.running_max:
            return True
        if num_running >= limits.mid_stream_max:
            return False
        return _is_in_mid_stream(sequence) or self._shares.may_exceed(sequence, limits.running_max)

    def _admit(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._blocks.open(sequence)
        self._shares.begin(sequence)
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        """Back to waiting. The caller has removed it from the running list."""
        self._blocks.close(sequence)
        self._shares.stop(sequence)
        sequence.state = SequenceState.WAITING
        self._waiting.add(sequence)

    def _take_prompt_scores(
        self, rows: ScoredRows, logprobs: tuple[TokenLogprob, ...] | None
    ) -> SessionTokens:
        sequence = rows.sequence
        if logprobs is None:
            return self._fail(sequence)
        sequence.num_scored += len(logprobs)
        finish = None if sequence.wants_prompt_logits or sequence.samples else FinishReason.LENGTH
        reply = sequence.reply(index=sequence.next_index, finish=finish)
        if finish is not None:
            self._end(sequence)
        return replace(reply, prompt_logprobs=logprobs, prompt_index=rows.first)

    def _fail(self, sequence: Sequence) -> SessionTokens:
        self._end(sequence)
        return sequence.reply(index=sequence.next_index, error="the model gave no finite logits")

    def _take_token(
        self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprob, ...]
    ) -> SessionTokens:
        index = sequence.next_index
        if token == NO_TOKEN:
            return self._fail(sequence)
        self._num_tokens += 1
        finish = sequence.append(token)
        backup = sequence.take_backup_change(self._replicator.backup_of(sequence.session))
        if finish is not None:
            self._end(sequence, finish)
        else:
            self._guided.hold_if_pending(sequence)
        return sequence.reply(
            (token,), index=index, finish=finish, logprobs=logprobs, backup=backup
        )

    def _rename(self, sequence: Sequence, session: SessionId) -> None:
        del self._sequences[sequence.session]
        self._blocks.rename(sequence, session)
        self._sequences[session] = sequence

    def _end(self, sequence: Sequence, finish: FinishReason | None = None) -> None:
        """`finish`: its last token has been generated."""
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
            self._blocks.close(sequence)
            self._shares.stop(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        self._guided.close(sequence)
        self._streams.on_end(sequence, finish)
        sequence.state = SequenceState.ENDED
        self._shares.leave(sequence)
        del self._sequences[sequence.session]
        self._num_tokens -= len(sequence.tokens)


def _is_in_mid_stream(sequence: Sequence) -> bool:
    return sequence.next_index > 0


def _joined(reply: SessionTokens, following: SessionTokens) -> SessionTokens:
    """One message for the tokens of both."""
    return replace(
        reply,
        ids=reply.ids + following.ids,
        logprobs=reply.logprobs + following.logprobs,
        finish=following.finish,
    )
