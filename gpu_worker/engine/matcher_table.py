"""The matchers of a rank and what its grammar child has yet to answer for each. Pure: calls of the
engine and answers of the child in, requests out.

A matcher is opened in a child, then advanced by one token at a time; until the answer its mask is
not known. When the child ends, all are opened again in the next one, after all their tokens: a mask
that is known stays known meanwhile, and a token that is drawn meanwhile is kept until the matcher
is there. An answer counts only if it is to the matcher's last request.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_worker.engine.grammar_matcher import TokenBitmask
from gpu_worker.engine.mask_patience import MaskPatience
from shared.grammars.messages import Advance, Close, Mask, Open, Refused, Request
from shared.grammars.supervisor import TOO_LARGE, TOO_LONG

DEATHS_MAX = 2
"""A matcher that ran when so many children in a row died is taken to be the reason."""


@dataclass(slots=True, eq=False)
class MatcherState:
    """Only the table changes it. `emitted` are all tokens so far."""

    id: int
    grammar: str
    emitted: list[int]
    allowed: TokenBitmask | None = None
    error: str | None = None
    job: int = -1  # the last request, until its answer
    is_opening: bool = True
    kept_token: int | None = None  # drawn while it was opened again
    deaths: int = 0


class MatcherTable:
    """`patience` says whether a step should wait for masks."""

    def __init__(self) -> None:
        self.patience = MaskPatience()
        self._matchers: dict[int, MatcherState] = {}
        self._jobs: dict[int, MatcherState] = {}
        self._numbers = itertools.count(1)

    @property
    def matchers(self) -> list[MatcherState]:
        return list(self._matchers.values())

    def open(self, grammar: str, emitted: Sequence[int]) -> tuple[MatcherState, list[Request]]:
        matcher = MatcherState(next(self._numbers), grammar, list(emitted))
        self._matchers[matcher.id] = matcher
        return matcher, [self._open(matcher)]

    def advance(self, matcher: MatcherState, token: int) -> list[Request]:
        matcher.emitted.append(token)
        matcher.allowed = None
        if matcher.is_opening:
            matcher.kept_token = token
            return []
        return [self._advance(matcher, token)]

    def close(self, matcher: MatcherState) -> list[Request]:
        if self._matchers.pop(matcher.id, None) is None:
            return []
        self._jobs.pop(matcher.job, None)
        self.patience.forget(matcher.job, matcher.id)
        return [Close(matcher=matcher.id)]

    def on_mask(self, mask: Mask) -> list[Request]:
        matcher = self._jobs.pop(mask.job, None)
        if matcher is None:
            return []
        self.patience.on_mask(mask.job, matcher.id, mask.cost_s)
        matcher.job, matcher.is_opening, matcher.deaths = -1, False, 0
        if matcher.kept_token is not None:
            token, matcher.kept_token = matcher.kept_token, None
            return [self._advance(matcher, token)]
        if matcher.allowed is None:  # else it was only opened again
            matcher.allowed = np.frombuffer(mask.bits, dtype=np.int32)
        return []

    def on_refused(self, refused: Refused) -> list[Request]:
        matcher = self._jobs.get(refused.job)
        return [] if matcher is None else self._fail(matcher, refused.error)

    def on_restart(self, blamed: int | None, *, overran: bool) -> list[Request]:
        """The next child is there, and knows no matcher. `blamed` is the job for which the one
        before ended."""
        matcher = None if blamed is None else self._jobs.get(blamed)
        if matcher is not None:
            matcher.deaths += 1
            if overran or matcher.deaths >= DEATHS_MAX:
                self._fail(matcher, TOO_LONG if overran else TOO_LARGE)
        self._jobs.clear()
        self.patience.on_waited()
        return [self._open(each) for each in self._matchers.values()]

    def on_unavailable(self, words: str) -> None:
        """There is no next child."""
        for matcher in self.matchers:
            self._fail(matcher, words)

    def _fail(self, matcher: MatcherState, words: str) -> list[Request]:
        matcher.allowed, matcher.error = None, f"the grammar cannot be followed: {words}"
        return self.close(matcher)

    def _open(self, matcher: MatcherState) -> Request:
        matcher.is_opening, matcher.kept_token = True, None
        job = self._new_job(matcher)
        return Open(
            job=job, matcher=matcher.id, grammar=matcher.grammar, emitted=[*matcher.emitted]
        )

    def _advance(self, matcher: MatcherState, token: int) -> Request:
        job = self._new_job(matcher)
        self.patience.on_sent(job, matcher.id)
        return Advance(job=job, matcher=matcher.id, token=token)

    def _new_job(self, matcher: MatcherState) -> int:
        matcher.job = next(self._numbers)
        self._jobs[matcher.job] = matcher
        return matcher.job
