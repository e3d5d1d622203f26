"""How a running session moves to another rank on purpose, so that its client does not notice. Pure.

Make before break. While the session goes on where it is, its *next attempt* is submitted to the
other rank with all tokens so far, and computes them there. By the time of its first token the
session has more of them: the next attempt *lags*. If it lags much, it is submitted anew, and finds
in that rank's prefix cache what it has computed: so each time it lags less. Once it lags little, it
becomes the session's attempt, and only then the former one is cancelled. Tokens count from one of
the two at any time. Of the new one, those that the client has must be the same ones again, for what
follows depends on them; where they are not, it is submitted anew.

A next attempt that fails is dropped, and the session goes on as if there had been none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from shared.types import Attempt, Member
from shared.wire import SessionTokens

LAG_MAX = 2
"""Tokens. Ranks step together: a token takes one step on its way to the gateway and back to another
rank."""
RENEWALS_MAX = 4
MOVES_AT_ONCE = 4
"""Of one gateway: what they compute on their new ranks lengthens the steps of all."""
RETRY_S = 0.5
"""After a next attempt has failed."""


class Readiness(Enum):
    NOT_YET = auto()
    LAGS = auto()  # submit it anew
    READY = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class NextAttempt:
    """`num_renewals`: so often it was submitted anew."""

    member: Member
    attempt: Attempt
    num_renewals: int = 0

    def renewed(self, attempt: Attempt) -> NextAttempt:
        return replace(self, attempt=attempt, num_renewals=self.num_renewals + 1)

    def judge(self, message: SessionTokens, emitted: Sequence[int]) -> Readiness:
        """`message` is of this attempt, `emitted` are all tokens that the client has."""
        if message.error is not None or message.finish is not None:
            return Readiness.FAILED
        if not message.ids:
            return Readiness.NOT_YET
        may_renew = self.num_renewals < RENEWALS_MAX
        if not repeats(message, emitted):
            return Readiness.LAGS if may_renew else Readiness.FAILED
        lag = len(emitted) - message.index - len(message.ids)
        return Readiness.LAGS if lag > LAG_MAX and may_renew else Readiness.READY


def repeats(message: SessionTokens, emitted: Sequence[int]) -> bool:
    """Whether its tokens are the ones that the client has, as far as it has them."""
    known = emitted[message.index : message.index + len(message.ids)]
    return list(message.ids[: len(known)]) == list(known)
