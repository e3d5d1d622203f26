"""Guided decoding, as the scheduler sees it: which tokens a session's grammar allows next. The
state is a function of the grammar and the tokens generated so far, so a continuation on another
rank has the same state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

TokenBitmask = NDArray[np.int32]


class GrammarMatcher(Protocol):
    """For one session. Engine thread only."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the text. Known once `allowed` is."""
        ...

    @property
    def allowed(self) -> TokenBitmask | None:
        """The tokens that may come next: bit `t % 32` of word `t // 32`. If the text may end, the
        end tokens are among them; if it must end, they are the only ones. None: not known yet."""
        ...

    @property
    def error(self) -> str | None:
        """Why it can never be followed further; a few words for the client."""
        ...

    def accept_token(self, token: int) -> None:
        """`token` was drawn. `allowed` is not known until it has been taken in."""
        ...

    def close(self) -> None: ...


class Grammars(Protocol):
    """Makes matchers. Nothing here takes longer than a moment: grammars are compiled, and masks
    computed, elsewhere."""

    def open(self, grammar: str, emitted: Sequence[int]) -> GrammarMatcher:
        """A matcher after the tokens `emitted` so far. Raises GrammarError if this rank follows no
        grammars."""
        ...

    def wait(self) -> None:
        """Gives masks of drawn tokens that are due at once a moment to come. A matcher that has
        been late is not waited for."""
        ...

    def renew(self, notify: Callable[[], None]) -> None:
        """Closes all matchers. From now on `notify` is called, on any thread, when one's `allowed`
        or `error` has become known."""
        ...
