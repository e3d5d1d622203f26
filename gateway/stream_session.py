"""One choice of a client request: its tokens, its attempt, and its state. Pure: events and `now`
in, actions out. `rank_choice` decides which rank gets an attempt.

Theory of operation. A session waits for a rank, runs on one, and ends. Its tokens are the prompt
and the tokens emitted so far. Whenever it loses its rank it waits again, and its next attempt is
submitted with all its tokens, so that the new rank continues at the next index. A message counts
only if it comes from the session's current rank and is for its current attempt; of such a message
only the ids from the next index on are used. So late, repeated and overlapping messages change
nothing. A gap, which an ordered connection cannot make, is a reason to move. The prompt's
log-probabilities, if the request asks for them, come before the first token and follow the same
rule by their place in the prompt. Once all have arrived, no later attempt computes them again.

    event                   waiting        running
    PLACED                  → running      –            a rank was chosen; Submit
    TOKENS                  –              running      new ids
    ENDED                   –              → finished   the rank said so, or max_tokens is reached
    REFUSED                 –              → waiting    with backoff: the rank cannot take it now
    RANK_LOST               –              → waiting    at once: link broken, or left out by a map
    MOVED                   –              running      its next attempt is its attempt now
    REJECTED                –              → failed     the rank says that no rank can run it
    GIVEN_UP                → failed       → failed     no rank in time, too many moves, too late,
                                                        shutdown
    STOPPED                 → finished     → finished   a stop string was found in the text
    CLIENT_GONE             → cancelled    → cancelled

A running session that is to leave its rank has a *next attempt* on another one: `planned_move`.

Every other pair, and every event in finished, failed and cancelled, is ignored.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

from msgspec.structs import replace

from gateway.planned_move import RETRY_S, NextAttempt, Readiness, repeats
from gateway.request_tag import NO_TAG, RequestTag
from gateway.session_state import (
    TRANSITIONS,
    Failure,
    FailureKind,
    SessionEvent,
    SessionPolicy,
    SessionState,
)
from shared.types import (
    DEFAULT_SCHEDULING,
    Attempt,
    FinishReason,
    Member,
    RankId,
    SamplingParams,
    SchedulingParams,
    SessionId,
)
from shared.wire import Cancel, SessionTokens, Submit, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A session went on `at` this time, `gap_s` after its rank was lost. On the rank that had its
    KV replicas, if `on_copy`."""

    at: float
    gap_s: float
    on_copy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SendToRank:
    """Send the message if the rank's link is open."""

    member: Member
    message: Submit | Cancel


class StreamSession:
    """Only its own methods change it. The HTTP API reads `emitted`, `logprobs` (one per emitted
    token, if asked for), `prompt_logprobs` (one per prompt token but the first), `state`, `finish`
    and `failure`."""

    __slots__ = (
        "_extends_below",
        "_last_attempt",
        "_losses",
        "_lost_at",
        "_on_copy",
        "_placed_at",
        "_policy",
        "_refusals",
        "_stalled_since",
        "attempt",
        "backup_rank",
        "cached_tokens",
        "emitted",
        "expires_at",
        "failure",
        "finish",
        "first_token_at",
        "home_rank",
        "id",
        "last_gap_s",
        "last_token_at",
        "logprobs",
        "longest_gap_s",
        "member",
        "moves",
        "next",
        "opened_at",
        "prompt",
        "prompt_logprobs",
        "queue_s",
        "ready_at",
        "resumptions",
        "sampling",
        "scheduling",
        "state",
        "stream_key",
        "tag",
        "taken_over",
        "tokens_before",
    )

    def __init__(
        self,
        *,
        session: SessionId,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        policy: SessionPolicy,
        now: float,
        scheduling: SchedulingParams = DEFAULT_SCHEDULING,
        expires_at: float = math.inf,
        stream_key: bytes = b"",
        home_rank: RankId | None = None,
        tag: RequestTag = NO_TAG,
    ) -> None:
        self.id = session
        self.tag = tag
        self.prompt = prompt
        self.sampling = sampling
        self.scheduling = scheduling
        self.expires_at = expires_at  # whatever happens on the way
        self.stream_key = stream_key
        self.home_rank = home_rank  # may have it from another gateway
        self.taken_over = False  # and did have it
        self.emitted: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.state = SessionState.WAITING
        self.attempt = Attempt(-1)  # the first placement is attempt 0
        self.next: NextAttempt | None = None
        self.member: Member | None = None
        self.backup_rank: RankId | None = None  # has KV replicas of the last attempt
        self.finish: FinishReason | None = None
        self.failure: Failure | None = None
        self.opened_at = now
        self.ready_at = now  # when a waiting session may be placed, and a running one moved
        self.cached_tokens = 0  # of the prompt, in the KV cache of the rank of the first token
        self.queue_s = 0.0  # until a rank began with the prompt that gave the first token
        self.tokens_before = 0  # emitted when its present attempt began
        self.resumptions: list[Resumption] = []
        self.first_token_at: float | None = None
        self.last_token_at = now
        self.last_gap_s = 0.0
        self.longest_gap_s = 0.0
        self.moves = 0
        self._extends_below = sampling.max_tokens if sampling.logprobs is None else 0
        self._policy = policy
        self._last_attempt = self.attempt
        self._stalled_since = now
        self._refusals = 0
        self._losses = 0
        self._placed_at = now
        self._lost_at: float | None = None  # its rank; None once it has gone on
        self._on_copy = False

    @property
    def ended(self) -> bool:
        return self.state is not SessionState.RUNNING and self.state is not SessionState.WAITING

    @property
    def has_lost_rank(self) -> bool:
        """And has had no token since."""
        return self._lost_at is not None

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that are known."""
        return (*self.prompt, *self.emitted) if self.emitted else self.prompt

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.emitted)

    @property
    def prompt_is_scored(self) -> bool:
        """Or need not be."""
        if self.sampling.prompt_logprobs is None:
            return True
        return len(self.prompt_logprobs) >= len(self.prompt) - 1

    @property
    def deadline_at(self) -> float:
        """When a waiting session gives up."""
        return self._stalled_since + self._policy.no_rank_timeout_s

    def place(self, member: Member, now: float) -> list[SendToRank]:
        """Starts the next attempt, on `member`."""
        if not self._transition(SessionEvent.PLACED):
            return []
        self.moves += self.attempt >= 0
        self.attempt = self._new_attempt()
        self.member = member
        self._placed_at = now
        self._on_copy = member.rank == self.backup_rank
        self.tokens_before = len(self.emitted)
        self.backup_rank = None
        return [self._submit(member, self.attempt)]

    def prepare_move(self, member: Member) -> list[SendToRank]:
        """Begins to move it to `member`, while it goes on where it is."""
        if self.state is not SessionState.RUNNING or self.next is not None:
            return []
        self.next = NextAttempt(member=member, attempt=self._new_attempt())
        return [self._submit(member, self.next.attempt)]

    def _new_attempt(self) -> Attempt:
        self._last_attempt = Attempt(self._last_attempt + 1)
        return self._last_attempt

    def _submit(self, member: Member, attempt: Attempt) -> SendToRank:
        sampling = self.sampling
        if sampling.prompt_logprobs is not None and self.prompt_is_scored:
            sampling = replace(sampling, prompt_logprobs=None)
        submit = Submit(
            session=self.id,
            attempt=attempt,
            tokens=self.tokens,
            num_emitted=len(self.emitted),
            sampling=sampling,
            scheduling=self.scheduling,
            stream_key=self.stream_key,
            request_id=self.tag.request_id,
            traceparent=self.tag.traceparent,
        )
        return SendToRank(member=member, message=submit)

    def extend(self, member: Member, message: SessionTokens, now: float) -> bool:
        """Nearly every message of a stream is the next tokens from its rank and nothing else. Takes
        it then; else nothing has happened, and it is for `on_tokens`."""
        emitted, ids = self.emitted, message.ids
        num_known = len(emitted)
        if (
            member is not self.member
            or message.attempt != self.attempt
            or message.index != num_known
            or not ids
            or num_known + len(ids) >= self._extends_below
            or self.state is not SessionState.RUNNING
            or self.first_token_at is None
            or message.finish is not None
            or message.error is not None
            or message.backup_rank >= 0
            or message.taken_over
            or message.prompt_logprobs
            or self._losses
            or self._refusals
        ):
            return False
        emitted += ids
        self.last_gap_s = gap_s = now - self.last_token_at
        if gap_s > self.longest_gap_s:
            self.longest_gap_s = gap_s
        self.last_token_at = now
        return True

    def on_tokens(self, member: Member, message: SessionTokens, now: float) -> list[SendToRank]:
        if self.state is not SessionState.RUNNING:
            return []
        if message.attempt != self.attempt:
            return self._on_next_attempt(member, message, now)
        if member != self.member:
            return []
        self.member = member  # the same object, so that `extend` need not compare values
        if message.taken_over:
            self.taken_over = True
        if message.backup_rank >= 0:
            self.backup_rank = RankId(message.backup_rank)
        if message.error is not None:
            if message.invalid:
                return self._fail(SessionEvent.REJECTED, FailureKind.INVALID, message.error)
            return self._on_error(message.error, message.retryable, now)
        if self._is_inconsistent(message):
            return self._lose_rank(
                SessionEvent.RANK_LOST, now
            )  # continues elsewhere from `emitted`
        if message.prompt_logprobs:
            known = len(self.prompt_logprobs) + 1 - message.prompt_index
            self.prompt_logprobs += message.prompt_logprobs[known:]
        known = len(self.emitted) - message.index
        if len(message.ids) > known:
            if not self.emitted:
                self.cached_tokens = min(message.cached_tokens, len(self.prompt))
                self.queue_s = self._placed_at - self.opened_at + message.queued_ms / 1000
            self._append_tokens(message.ids[known:], message.logprobs[known:], now)
        return self._maybe_end(message.finish, now)

    def on_rank_lost(self, member: Member, now: float) -> list[SendToRank]:
        """The link to `member` broke, or a map left it out."""
        if self.next is not None and self.next.member == member:
            self.next = None
        if self.member != member or self.state is not SessionState.RUNNING:
            return []
        return self._lose_rank(SessionEvent.RANK_LOST, now)

    def on_time(self, now: float) -> list[SendToRank]:
        """Gives up if it has waited for too long, or if the request's time is over."""
        if now >= self.expires_at:
            after_s = max(0.0, self.expires_at - self.opened_at)
            return self._fail(
                SessionEvent.GIVEN_UP,
                FailureKind.DEADLINE,
                f"the request's timeout is over, {after_s:.3g} s after it began; "
                f"{len(self.emitted)} tokens were generated",
            )
        if self.state is not SessionState.WAITING or now < self.deadline_at:
            return []
        waited_s = self._policy.no_rank_timeout_s
        return self._fail(
            SessionEvent.GIVEN_UP, FailureKind.NO_RANK, f"no rank accepted it within {waited_s:g} s"
        )

    def stop(self) -> list[SendToRank]:
        """Ends it: a stop string was found in its text."""
        self.finish = self.finish if self.ended else FinishReason.STOP
        return self._end_attempt(SessionEvent.STOPPED)

    def cancel(self) -> list[SendToRank]:
        """Ends it: its client is gone."""
        return self._end_attempt(SessionEvent.CLIENT_GONE)

    def on_standstill(self, member: Member) -> list[SendToRank]:
        """Its rank has finished no step for as long as a session waits for a rank."""
        if self.member != member or self.state is not SessionState.RUNNING:
            return []
        waited_s = self._policy.no_rank_timeout_s
        message = f"its rank has finished no step for {waited_s:g} s; is a control plane running?"
        return self._fail(SessionEvent.GIVEN_UP, FailureKind.STALLED, message)

    def shut_down(self) -> list[SendToRank]:
        return self._fail(
            SessionEvent.GIVEN_UP, FailureKind.SHUTDOWN, "the gateway is shutting down"
        )

    def _on_next_attempt(
        self, member: Member, message: SessionTokens, now: float
    ) -> list[SendToRank]:
        following = self.next
        if following is None or (following.member, following.attempt) != (member, message.attempt):
            return []
        match following.judge(message, self.emitted):
            case Readiness.NOT_YET:
                return []
            case Readiness.FAILED:
                self.ready_at = now + RETRY_S
                return self._drop_next()
            case Readiness.LAGS:
                self.next = following.renewed(self._new_attempt())
                return [self._submit(member, self.next.attempt)]
            case Readiness.READY:
                return [*self._switch(following), *self.on_tokens(member, message, now)]

    def _switch(self, following: NextAttempt) -> list[SendToRank]:
        """From now on its tokens come from there."""
        former, former_attempt = self.member, self.attempt
        assert former is not None, "it runs"
        self._transition(SessionEvent.MOVED)
        self.member, self.attempt, self.next = following.member, following.attempt, None
        self.moves += 1
        self.backup_rank = None
        return [SendToRank(member=former, message=Cancel(session=self.id, attempt=former_attempt))]

    def _drop_next(self) -> list[SendToRank]:
        following, self.next = self.next, None
        if following is None:
            return []
        cancel = Cancel(session=self.id, attempt=following.attempt)
        return [SendToRank(member=following.member, message=cancel)]

    def _is_inconsistent(self, message: SessionTokens) -> bool:
        """Whether the message skips tokens, has others than those that the client has, or lacks
        what the attempt was asked for."""
        next_index = len(self.emitted)
        end = message.index + len(message.ids)
        if message.index > next_index or (end < next_index and message.finish is not None):
            return True
        if message.index < next_index and not repeats(message, self.emitted):
            return True
        if message.prompt_logprobs and message.prompt_index > len(self.prompt_logprobs) + 1:
            return True
        return self.sampling.logprobs is not None and len(message.logprobs) != len(message.ids)

    def _transition(self, event: SessionEvent) -> bool:
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            return False
        self.state = target
        return True

    def _append_tokens(
        self, ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], now: float
    ) -> None:
        room = self.sampling.max_tokens - len(self.emitted)
        self.emitted += ids if len(ids) <= room else ids[:room]
        if logprobs:
            self.logprobs += logprobs[:room]
        if self.first_token_at is None:
            self.first_token_at = now
        else:
            self.last_gap_s = gap_s = now - self.last_token_at
            if gap_s > self.longest_gap_s:
                self.longest_gap_s = gap_s
        self.last_token_at = now
        if self._losses or self._refusals:
            self._go_on(now)
        # And TOKENS leads from running to running.

    def _go_on(self, now: float) -> None:
        """It has got a token since ranks were lost, or refused it."""
        if self._lost_at is not None:
            gap_s, self._lost_at = now - self._lost_at, None
            self.resumptions.append(Resumption(at=now, gap_s=gap_s, on_copy=self._on_copy))
        self._losses = self._refusals = 0

    def _maybe_end(self, finish: FinishReason | None, now: float) -> list[SendToRank]:
        if finish is FinishReason.CANCELLED:
            # A session leaves an attempt before it cancels it, so the rank decided this.
            return self._on_error("the rank cancelled it", True, now)
        if finish is not None:
            self.finish = finish
            self._transition(SessionEvent.ENDED)
            return self._drop_next()
        if len(self.emitted) >= self.sampling.max_tokens and self.prompt_is_scored:
            self.finish = FinishReason.LENGTH
            return self._end_attempt(SessionEvent.ENDED)
        return []

    def _on_error(self, error: str, retryable: bool, now: float) -> list[SendToRank]:
        """The rank has ended the attempt."""
        actions = self._drop_next()
        if not retryable:
            self._fail(SessionEvent.REJECTED, FailureKind.REJECTED, error)
            return actions
        self._refusals += 1
        if self._refusals > self._policy.refusals_max:
            message = f"refused by ranks {self._refusals} times, last because {error}"
            self._fail(SessionEvent.GIVEN_UP, FailureKind.OVERLOADED, message)
            return actions
        self._transition(SessionEvent.REFUSED)
        self.ready_at = now + self._backoff_s()
        return actions

    def _lose_rank(self, event: SessionEvent, now: float) -> list[SendToRank]:
        self._losses += 1
        if self._lost_at is None:
            self._lost_at = now
        policy = self._policy
        if self._losses > (
            policy.guided_losses_max if self.sampling.grammar else policy.losses_max
        ):
            message = f"{self._losses} ranks in a row were lost before its next token"
            return self._fail(SessionEvent.GIVEN_UP, FailureKind.RANKS_LOST, message)
        self._stalled_since = self.ready_at = now
        return self._end_attempt(event)

    def _fail(self, event: SessionEvent, kind: FailureKind, message: str) -> list[SendToRank]:
        if not self.ended:
            self.failure = Failure(kind=kind, message=message)
        return self._end_attempt(event)

    def _end_attempt(self, event: SessionEvent) -> list[SendToRank]:
        """Applies the event and cancels the attempt if it runs on a rank."""
        running = self.state is SessionState.RUNNING
        if not self._transition(event) or not running or self.member is None:
            return []
        cancel = Cancel(session=self.id, attempt=self.attempt)
        return [SendToRank(member=self.member, message=cancel), *self._drop_next()]

    def _backoff_s(self) -> float:
        full_s = self._policy.backoff_min_s * 2.0 ** min(self._refusals - 1, 16)
        # Jitter from the ids spreads sessions that were refused together, and is reproducible.
        spread = zlib.crc32(f"{self.id}/{self.attempt}".encode()) / 2**32
        return float(min(full_s, self._policy.backoff_max_s) * (0.5 + spread))
