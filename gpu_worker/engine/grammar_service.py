"""Matchers that live in a grammar child: neither a grammar nor a mask ever runs on the engine
thread, and one that takes too much time or memory takes nothing down but its own session. If the
child ends, its matchers are made again from their grammars and tokens."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from gpu_worker.engine.grammar_matcher import TokenBitmask
from gpu_worker.engine.mask_patience import MaskPatience
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

DEATHS_MAX = 2
"""A matcher that ran when so many children in a row died is taken to be the reason."""


@dataclass(slots=True, eq=False)
class _State:
    """One matcher. The service's lock guards it."""

    id: int
    grammar: str
    emitted: list[int]
    job: int = -1  # the request whose answer gives `allowed`; -1: none
    allowed: TokenBitmask | None = None
    error: str | None = None
    deaths: int = 0


class GrammarService:
    """Implements `grammar_matcher.Grammars`."""

    def __init__(self, tokenizer: TokenizerFile, budget: GrammarBudget) -> None:
        self._changed = threading.Condition()
        self._states: dict[int, _State] = {}
        self._jobs: dict[int, _State] = {}
        self._patience = MaskPatience()
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
            wait_s = self._patience.wait_s
            if wait_s and not self._changed.wait_for(lambda: not self._patience.wait_s, wait_s):
                self._patience.on_waited()

    def renew(self, notify: Callable[[], None]) -> None:
        with self._changed:
            self._notify = notify
            for state in list(self._states.values()):
                self.close_matcher(state)

    def advance(self, state: _State, token: int) -> None:
        with self._changed:
            state.emitted.append(token)
            state.allowed = None
            job = self._new_job(state)
            self._patience.on_sent(job, state.id)
            self._supervisor.send(Advance(job=job, matcher=state.id, token=token))

    def close_matcher(self, state: _State) -> None:
        with self._changed:
            self._states.pop(state.id, None)
            self._jobs.pop(state.job, None)
            self._patience.forget(state.job, state.id)
            self._supervisor.send(Close(matcher=state.id))

    # What the child answers ----------------------------------------------------------------------

    def _on_reply(self, reply: Reply) -> None:
        match reply:
            case Ready(end_ids=end_ids):
                self.end_ids = tuple(end_ids)
            case Mask(job=job, bits=bits, cost_s=cost_s):
                self._settle(job, np.frombuffer(bits, dtype=np.int32), None, cost_s)
            case Refused(job=job, error=error):
                self._settle(job, None, f"the grammar cannot be followed: {error}", 0.0)

    def _settle(
        self, job: int, allowed: TokenBitmask | None, error: str | None, cost_s: float
    ) -> None:
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
            self._patience.on_mask(job, state.id, cost_s)
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
            self._patience.on_waited()
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
        job = self._new_job(state)
        self._supervisor.send(
            Open(job=job, matcher=state.id, grammar=state.grammar, emitted=state.emitted)
        )

    def _new_job(self, state: _State) -> int:
        state.job = next(self._numbers)
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
