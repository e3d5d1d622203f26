"""Matchers that live in a grammar child: neither a grammar nor a mask ever runs on the engine
thread, and one that takes too much time or memory takes nothing down but its own session. If the
child ends, its matchers are made again from their grammars and tokens."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from gpu_worker.engine.grammar_matcher import TokenBitmask
from shared.clock import Clock
from shared.errors import GrammarError
from shared.grammars.child import ChildEnd, TokenizerFile
from shared.grammars.messages import (
    Advance,
    Close,
    GrammarBudget,
    Mask,
    Open,
    Ready,
    Refused,
    Reply,
)
from shared.grammars.supervisor import TOO_LARGE, TOO_LONG, UNAVAILABLE, GrammarSupervisor

log = structlog.get_logger()

WAIT_S = 0.002
"""How long a step may wait for masks."""
PROMPT_AGAIN_AFTER = 32
"""A matcher that was late is waited for again after so many masks in time."""
DEATHS_MAX = 2
"""A matcher that ran when so many children in a row died is taken to be the reason."""


@dataclass(slots=True, eq=False)
class _State:
    """One matcher. The service's lock guards it."""

    id: int
    grammar: str
    emitted: list[int]
    job: int = -1  # the request whose answer gives `allowed`; -1: none
    sent_at: float = 0.0
    is_step: bool = False
    allowed: TokenBitmask | None = None
    error: str | None = None
    deaths: int = 0
    masks_in_time: int = field(default=PROMPT_AGAIN_AFTER)

    @property
    def is_due(self) -> bool:
        """Whether a step waits for it."""
        return self.is_step and self.job >= 0 and self.masks_in_time >= PROMPT_AGAIN_AFTER


class GrammarService:
    """Implements `grammar_matcher.Grammars`."""

    def __init__(self, tokenizer: TokenizerFile, budget: GrammarBudget, clock: Clock) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._states: dict[int, _State] = {}
        self._jobs: dict[int, _State] = {}
        self._numbers = itertools.count(1)
        self._notify: Callable[[], None] = _nobody
        self._is_unavailable = False
        self.end_ids = tokenizer.eos_token_ids
        self._supervisor = GrammarSupervisor(
            tokenizer,
            budget,
            on_reply=self._on_reply,
            on_restart=self._on_restart,
            on_unavailable=self._on_unavailable,
        )

    def start(self) -> None:
        """Raises OSError if no process can be started."""
        self._supervisor.start()

    def close(self) -> None:
        self._supervisor.close()

    @property
    def child_pid(self) -> int | None:
        return self._supervisor.pid

    # What the engine asks ------------------------------------------------------------------------

    def open(self, grammar: str, emitted: Sequence[int]) -> ServedMatcher:
        if self._is_unavailable:
            raise GrammarError(UNAVAILABLE)
        with self._changed:
            state = _State(next(self._numbers), grammar, list(emitted))
            self._states[state.id] = state
            self._send_open(state)
        return ServedMatcher(self, state)

    def wait(self) -> None:
        with self._changed:
            if self._changed.wait_for(
                lambda: not any(s.is_due for s in self._jobs.values()), WAIT_S
            ):
                return
            for state in self._jobs.values():
                if state.is_step:
                    state.masks_in_time = 0

    def renew(self, notify: Callable[[], None]) -> None:
        with self._changed:
            self._notify = notify
            for state in list(self._states.values()):
                self.close_matcher(state)

    def advance(self, state: _State, token: int) -> None:
        with self._changed:
            state.emitted.append(token)
            state.allowed = None
            state.is_step = True
            job = self._new_job(state)
            self._supervisor.send(Advance(job=job, matcher=state.id, token=token))

    def close_matcher(self, state: _State) -> None:
        with self._changed:
            self._states.pop(state.id, None)
            self._jobs.pop(state.job, None)
            self._supervisor.send(Close(matcher=state.id))

    # What the child answers ----------------------------------------------------------------------

    def _on_reply(self, reply: Reply) -> None:
        match reply:
            case Ready(end_ids=end_ids):
                self.end_ids = tuple(end_ids)
            case Mask(job=job, bits=bits):
                self._settle(job, np.frombuffer(bits, dtype=np.int32), None)
            case Refused(job=job, error=error):
                self._settle(job, None, f"the grammar cannot be followed: {error}")

    def _settle(self, job: int, allowed: TokenBitmask | None, error: str | None) -> None:
        with self._changed:
            state = self._jobs.pop(job, None)
            if state is None:
                return
            if state.allowed is None:  # else it was only made again
                state.allowed, state.error = allowed, error
            elif error is not None:
                state.allowed, state.error = None, error
            state.job = -1
            state.deaths = 0
            if self._clock.now() - state.sent_at < WAIT_S:
                state.masks_in_time += 1
            self._changed.notify_all()
        self._notify()

    def _on_restart(self, end: ChildEnd) -> None:
        with self._changed:
            blamed = self._jobs.get(-1 if end.blamed is None else end.blamed)
            log.warning("grammar_child_ended", detail=end.detail, blamed=blamed is not None)
            if blamed is not None:
                blamed.deaths += 1
                if end.overran or blamed.deaths >= DEATHS_MAX:
                    words = TOO_LONG if end.overran else TOO_LARGE
                    self._fail(blamed, words)
            self._jobs.clear()
            for state in self._states.values():
                self._send_open(state)
            self._changed.notify_all()
        self._notify()

    def _on_unavailable(self, detail: str) -> None:
        log.error("no_guided_decoding", detail=detail)
        with self._changed:
            self._is_unavailable = True
            for state in list(self._states.values()):
                self._fail(state, UNAVAILABLE)
            self._jobs.clear()
            self._changed.notify_all()
        self._notify()

    def _fail(self, state: _State, words: str) -> None:
        self._states.pop(state.id, None)
        state.allowed, state.error = None, f"the grammar cannot be followed: {words}"

    def _send_open(self, state: _State) -> None:
        state.is_step = False
        job = self._new_job(state)
        self._supervisor.send(
            Open(job=job, matcher=state.id, grammar=state.grammar, emitted=state.emitted)
        )

    def _new_job(self, state: _State) -> int:
        state.job = next(self._numbers)
        state.sent_at = self._clock.now()
        self._jobs[state.job] = state
        return state.job


class ServedMatcher:
    """Implements `grammar_matcher.GrammarMatcher`."""

    def __init__(self, service: GrammarService, state: _State) -> None:
        self._service = service
        self._state = state

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self._service.end_ids

    @property
    def allowed(self) -> TokenBitmask | None:
        return self._state.allowed

    @property
    def error(self) -> str | None:
        return self._state.error

    def accept_token(self, token: int) -> None:
        self._service.advance(self._state, token)

    def close(self) -> None:
        self._service.close_matcher(self._state)


def _nobody() -> None:
    """Nobody is to be told yet."""
