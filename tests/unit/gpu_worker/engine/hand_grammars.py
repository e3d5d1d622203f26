"""Grammars whose masks come when the test says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gpu_worker.engine.grammar_matcher import TokenBitmask

ALL = np.array([-1], dtype=np.int32)


class HandMatcher:
    """Implements `grammar_matcher.GrammarMatcher`. `accepted` are the tokens that it was given,
    those at its opening included."""

    end_ids = (1,)

    def __init__(self, grammar: str, emitted: Sequence[int]) -> None:
        self.grammar = grammar
        self.accepted = list(emitted)
        self.allowed: TokenBitmask | None = None
        self.error: str | None = None
        self.closed = False

    def accept_token(self, token: int) -> None:
        self.accepted.append(token)
        self.allowed = None

    def allow(self, *tokens: int) -> None:
        bits = sum(1 << token for token in tokens)
        self.allowed = np.array([bits], dtype=np.int32) if tokens else ALL

    def close(self) -> None:
        self.closed = True


class HandGrammars:
    """Implements `grammar_matcher.Grammars`."""

    def __init__(self) -> None:
        self.opened: list[HandMatcher] = []
        self.num_waits = 0

    def open(self, grammar: str, emitted: Sequence[int]) -> HandMatcher:
        self.opened.append(HandMatcher(grammar, emitted))
        return self.opened[-1]

    def wait(self) -> None:
        self.num_waits += 1

    def renew(self, notify: Callable[[], None]) -> None:
        self.opened.clear()
