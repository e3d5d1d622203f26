"""One attempt of a session on this rank: its tokens, how many of them are in the KV cache, and when
it ends. The scheduler decides when it runs."""

from __future__ import annotations

from enum import Enum
from typing import NewType

from gpu_worker.engine.draw_state import DrawState
from gpu_worker.engine.grammar_matcher import GrammarMatcher, TokenBitmask
from shared.types import FinishReason, RankId
from shared.wire import SessionTokens, Submit, TokenLogprob

Origin = NewType("Origin", int)
"""The connection that a session came from and its tokens go to; opaque here."""

NO_ROW = -1


class SequenceState(Enum):
    """`scheduler.py` has the transition table."""

    COMPILING = "compiling"  # its grammar is being compiled; holds no KV blocks
    WAITING = "waiting"  # holds no KV blocks
    RUNNING = "running"  # holds blocks for all its known tokens
    ENDED = "ended"  # finished, failed or cancelled; the scheduler has forgotten it


class Sequence:
    """Mutable; only the scheduler changes it. `tokens` are all known tokens: those of the Submit,
    then those generated here. The KV of the first `num_computed` of them is in the cache."""

    __slots__ = (
        "_draw_state",
        "arrival",
        "arrived_at",
        "attempt",
        "block_names",
        "decoded_in",
        "drafts",
        "is_charged",
        "matcher",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_emitted",
        "num_given",
        "num_offered",
        "num_prompt",
        "num_published",
        "num_scored",
        "origin",
        "queued_s",
        "reported_backup",
        "row",
        "sampling",
        "scheduling",
        "session",
        "state",
        "stop_ids",
        "stream_key",
        "tokens",
        "tokens_max",
    )

    def __init__(
        self,
        submit: Submit,
        *,
        origin: Origin,
        arrival: int,
        eos_token_ids: tuple[int, ...],
        tokens_max: int,
        now: float = 0.0,
    ) -> None:
        self.session = submit.session
        self.attempt = submit.attempt
        self.origin = origin
        self.arrival = arrival
        self.arrived_at = now
        self.queued_s: float | None = None  # until it first ran
        self.sampling = submit.sampling
        self.scheduling = submit.scheduling
        self.stream_key = submit.stream_key
        self.tokens = list(submit.tokens)
        self.num_given = len(submit.tokens)
        self.num_emitted = submit.num_emitted
        self.num_prompt = self.num_given - self.num_emitted
        self.num_scored = 0  # prompt tokens, after the first, whose log-probability is sent
        self._draw_state: DrawState | None = None
        self.matcher: GrammarMatcher | None = None
        self.num_computed = 0
        self.block_names: list[bytes] = []  # of the full blocks of `tokens`, as far as requested
        self.drafts: tuple[int, ...] = ()  # guesses of the tokens after `tokens`; see `drafting`
        self.num_published = 0  # blocks of its row that are named, so never written again
        self.num_offered = 0  # of these, how many were offered to the replicator
        self.num_cached: int | None = None  # tokens that were in the cache when it first ran
        self.num_charged = 0  # tokens of its prompt that its tenant was charged
        self.decoded_in = 0  # the last step in which it did, as `StepShares` counts those it limits
        self.is_charged = False  # and that cannot be taken back any more
        self.reported_backup: RankId | None = None  # the backup rank that its client knows
        self.state = SequenceState.WAITING
        self.row = NO_ROW
        self.tokens_max = tokens_max
        eos = () if submit.sampling.ignore_eos else eos_token_ids
        self.stop_ids = tuple(sorted({*submit.sampling.stop_token_ids, *eos}))

    @property
    def draw_state(self) -> DrawState:
        """Made when it is first asked for, in the step in which it begins to run: hundreds of
        sequences may come between two steps, each with a thousand ids to make arrays of."""
        if self._draw_state is None:
            prompt, generated = self.tokens[: self.num_prompt], self.tokens[self.num_prompt :]
            self._draw_state = DrawState.of(self.sampling, prompt, generated)
        return self._draw_state

    def set_matcher(self, matcher: GrammarMatcher) -> None:
        """From now on `matcher` limits what may be drawn. It ends the text with an end token, which
        is then a stop token even if the client ignores end tokens."""
        self.matcher = matcher
        self.stop_ids = tuple(sorted({*self.stop_ids, *matcher.end_ids}))

    def begin(self, now: float) -> None:
        """It runs. Afterwards it may wait again, and begin again."""
        if self.queued_s is None:
            self.queued_s = now - self.arrived_at

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV is not in the cache; 1 while it decodes, never 0."""
        return len(self.tokens) - self.num_computed

    @property
    def next_index(self) -> int:
        """The session-wide index of the next token."""
        return self._index_at(len(self.tokens))

    @property
    def priority(self) -> tuple[bool, int, int]:
        """Lower runs first: clients in mid-stream before those who have seen no token, then the
        request's priority, then by arrival. Its tenant's share counts before arrival:
        `TenantShares`."""
        return (self.next_index == 0, self.scheduling.priority, self.arrival)

    def banned_ids_at(self, num_tokens: int) -> tuple[int, ...]:
        """Ids that must not be drawn after so many tokens, because the request bans them or because
        they would end it too early. A grammar may allow nothing but the end, which is not banned
        then."""
        is_early = self._index_at(num_tokens) < self.sampling.min_tokens and self.matcher is None
        limits = self.draw_state.limits
        banned = () if limits is None else limits.banned()
        return (*self.stop_ids, *banned) if is_early else banned

    @property
    def allowed(self) -> TokenBitmask | None:
        """The tokens that may come next; None: all."""
        by_grammar = None if self.matcher is None else self.matcher.allowed
        limits = self.draw_state.limits
        return by_grammar if limits is None else limits.allowed(by_grammar)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether what may come next depends on tokens that a step in flight samples."""
        return self.matcher is not None or self.draw_state.depends_on_tokens

    def may_have_drafts_at(self, num_tokens: int) -> bool:
        """Whether, once it has so many tokens, a guess of the next one is of use: it generates more
        than one, and they depend on nothing but logits and seed."""
        return not self.depends_on_tokens and not self.is_full_at(num_tokens + 1)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether it must compute the rows from `num_scored` on itself: a cached block has no
        logits."""
        return self.sampling.prompt_logprobs is not None and self.num_scored < self.num_prompt - 1

    @property
    def samples(self) -> bool:
        """False if only its prompt is to be scored."""
        return self.sampling.max_tokens > 0

    def finish_if_full(self) -> FinishReason | None:
        """A continuation may arrive with nothing left to generate."""
        if not self.wants_prompt_logits and self.is_full_at(len(self.tokens)):
            return FinishReason.LENGTH
        return None

    def is_full_at(self, num_tokens: int) -> bool:
        """Whether nothing is generated after so many tokens."""
        return (
            self._index_at(num_tokens) >= self.sampling.max_tokens or num_tokens >= self.tokens_max
        )

    def append(self, token: int) -> FinishReason | None:
        """Appends the next token; returns the reason if it is the last one."""
        self.draw_state.add(token)  # before it is one of `tokens`, of which the state is made
        self.tokens.append(token)
        if token in self.stop_ids:
            return FinishReason.STOP
        finish = self.finish_if_full()
        if finish is None and self.matcher is not None:
            self.matcher.accept_token(token)
        return finish

    def take_backup_change(self, backup: RankId | None) -> RankId | None:
        """The backup rank, if the client must be told of it in the next reply; else None."""
        if backup is None or backup == self.reported_backup:
            return None
        self.reported_backup = backup
        return backup

    def _index_at(self, num_tokens: int) -> int:
        return self.num_emitted + num_tokens - self.num_given

    def reply(
        self,
        ids: tuple[int, ...] = (),
        *,
        index: int,
        finish: FinishReason | None = None,
        error: str | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
        backup: RankId | None = None,
    ) -> SessionTokens:
        is_first = bool(ids) and index == self.num_emitted
        return SessionTokens(
            session=self.session,
            attempt=self.attempt,
            index=index,
            ids=ids,
            finish=finish,
            error=error,
            logprobs=logprobs,
            backup_rank=-1 if backup is None else backup,
            cached_tokens=(self.num_cached or 0) if is_first else 0,
            queued_ms=round((self.queued_s or 0.0) * 1000, 3) if is_first else 0.0,
        )
