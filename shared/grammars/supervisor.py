"""Keeps a grammar child running: starts another when one has ended, later each time if they do not
last. What is lost with a child, its owner sends again."""

from __future__ import annotations

import threading
from collections.abc import Callable

from shared.clock import SystemClock
from shared.grammars.child import ChildEnd, GrammarChild, TokenizerFile
from shared.grammars.messages import GrammarBudget, Ready, Reply, Request, Unusable

USELESS_ENDS_MAX = 5
"""After so many children in a row that ended by themselves and neither answered nor lasted, there
is no more: no tokenizer, not enough memory for it, or something here that none survives."""
LASTS_S = 10.0
"""A child that was ready for so long was of use, whether it was asked or not."""
_BACKOFF_S = 0.05
_BACKOFF_MAX_S = 2.0

TOO_LONG = "it takes too long to follow"
TOO_LARGE = "it takes too much memory to follow"
UNAVAILABLE = "grammars cannot be followed here; the log says why"


class GrammarSupervisor:
    """`on_reply` and `on_restart` are called on threads of this object. `on_restart` is called when
    the next child is there, with the end of the one before; the new one knows nothing yet.
    `on_unavailable`: there will be no more."""

    def __init__(
        self,
        tokenizer: TokenizerFile,
        budget: GrammarBudget,
        *,
        on_reply: Callable[[Reply], None],
        on_restart: Callable[[ChildEnd], None],
        on_unavailable: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._budget = budget
        self._on_reply = on_reply
        self._on_restart = on_restart
        self._on_unavailable = on_unavailable
        self._closed = threading.Event()
        self._clock = SystemClock()
        self._useless_ends = 0
        self._has_answered = False
        self._ready_at: float | None = None  # the clock's seconds; None: not yet
        self._unusable: str | None = None
        self._child: GrammarChild | None = None

    def start(self) -> None:
        """Raises OSError if no process can be started."""
        self._child = self._start()

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def send(self, request: Request) -> None:
        """Does nothing between two children: `on_restart` follows."""
        child = self._child
        if child is not None:
            child.send(request)

    def close(self) -> None:
        self._closed.set()
        if self._child is not None:
            self._child.kill()

    def _start(self) -> GrammarChild:
        return GrammarChild(self._tokenizer, self._budget, on_reply=self._take, on_end=self._on_end)

    def _take(self, reply: Reply) -> None:
        match reply:
            case Ready():
                self._ready_at = self._clock.now()
            case Unusable(error=error):
                self._unusable = error
                return
            case _:
                self._has_answered = True
        self._on_reply(reply)

    def _on_end(self, end: ChildEnd) -> None:
        """On the ended child's thread, which may wait."""
        self._child = None
        if self._closed.is_set():
            return
        self._useless_ends = 0 if self._was_of_use(end) else self._useless_ends + 1
        self._has_answered, self._ready_at = False, None
        if self._unusable is not None or self._useless_ends > USELESS_ENDS_MAX:
            self._on_unavailable(self._unusable or end.detail)
            return
        delay_s = min(_BACKOFF_S * 2.0 ** max(self._useless_ends - 1, 0), _BACKOFF_MAX_S)
        if self._closed.wait(delay_s):
            return
        try:
            self._child = self._start()
        except OSError as error:
            self._on_unavailable(str(error))
            return
        self._on_restart(end)

    def _was_of_use(self, end: ChildEnd) -> bool:
        """A child that a job ended counts as one: whoever sends such jobs must not end grammars for
        everyone."""
        if self._has_answered or end.blamed is not None:
            return True
        return self._ready_at is not None and self._clock.now() - self._ready_at >= LASTS_S
