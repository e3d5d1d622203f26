"""Matchers that live in a grammar child: neither a grammar nor a mask ever runs on the engine
thread, and one that takes too much time or memory takes nothing down but its own session. What is
asked of the child, and what its answers and its end mean, `matcher_table` decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import structlog

from gpu_worker.engine.grammar_matcher import TokenBitmask
from gpu_worker.engine.matcher_table import MatcherState, MatcherTable
from shared.errors import GrammarError
from shared.grammars.child import ChildEnd, TokenizerFile
from shared.grammars.messages import GrammarBudget, Mask, Ready, Refused, Reply, Request
from shared.grammars.supervisor import UNAVAILABLE, GrammarSupervisor

log = structlog.get_logger()


class GrammarService:
    """Implements `grammar_matcher.Grammars`. The engine thread and the child's threads meet in the
    table, under one lock that nobody holds for long."""

    def __init__(self, tokenizer: TokenizerFile, budget: GrammarBudget) -> None:
        self._changed = threading.Condition()
        self._table = MatcherTable()
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

    def shut_down(self) -> None:
        self._supervisor.close()

    @property
    def child_pid(self) -> int | None:
        return self._supervisor.pid

    # What the engine asks ------------------------------------------------------------------------

    def open(self, grammar: str, emitted: Sequence[int]) -> ServedMatcher:
        with self._changed:
            if self._is_unavailable:
                raise GrammarError(UNAVAILABLE)
            state, requests = self._table.open(grammar, emitted)
            self._send(requests)
        return ServedMatcher(self, state)

    def wait(self) -> None:
        patience = self._table.patience
        with self._changed:
            wait_s = patience.wait_s
            if wait_s and not self._changed.wait_for(lambda: not patience.wait_s, wait_s):
                patience.on_waited()

    def renew(self, notify: Callable[[], None]) -> None:
        with self._changed:
            self._notify = notify
            for state in self._table.matchers:
                self._send(self._table.close(state))

    def advance(self, state: MatcherState, token: int) -> None:
        with self._changed:
            self._send(self._table.advance(state, token))

    def close(self, state: MatcherState) -> None:
        with self._changed:
            self._send(self._table.close(state))

    # What the child answers ----------------------------------------------------------------------

    def _on_reply(self, reply: Reply) -> None:
        with self._changed:
            match reply:
                case Ready(end_ids=end_ids):
                    self.end_ids = tuple(end_ids)
                case Mask():
                    self._send(self._table.on_mask(reply))
                case Refused():
                    self._send(self._table.on_refused(reply))
            self._changed.notify_all()
        self._notify()

    def _on_restart(self, end: ChildEnd) -> None:
        log.warning("grammar_child_ended", detail=end.detail, blamed=end.blamed is not None)
        with self._changed:
            self._send(self._table.on_restart(end.blamed, overran=end.overran))
            self._changed.notify_all()
        self._notify()

    def _on_unavailable(self, detail: str) -> None:
        log.error("no_guided_decoding", detail=detail)
        with self._changed:
            self._is_unavailable = True
            self._table.on_unavailable(UNAVAILABLE)
            self._changed.notify_all()
        self._notify()

    def _send(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._supervisor.send(request)


class ServedMatcher:
    """Implements `grammar_matcher.GrammarMatcher`."""

    def __init__(self, service: GrammarService, state: MatcherState) -> None:
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
        self._service.close(self._state)


def _nobody() -> None:
    """Nobody is to be told yet."""
