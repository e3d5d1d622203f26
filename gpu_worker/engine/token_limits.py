"""Which tokens a request's own limits allow next: allowed ids, bad words, the budget of its
reasoning. The state is a function of the tokens generated so far, so a continuation on another rank
has the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from gpu_worker.engine.grammar_matcher import TokenBitmask
from shared.types import SamplingParams, ThinkingBudget


def bitmask_of(ids: Iterable[int]) -> TokenBitmask:
    """As long as the greatest id needs: ids beyond its end may not be drawn."""
    unique = np.unique(np.fromiter((i for i in ids if i >= 0), dtype=np.int64))
    words = np.zeros(int(unique[-1]) // 32 + 1 if len(unique) else 0, dtype=np.uint32)
    np.bitwise_or.at(words, unique // 32, np.uint32(1) << (unique % 32).astype(np.uint32))
    return words.view(np.int32)


def has_bit(mask: TokenBitmask, token: int) -> bool:
    return token // 32 < len(mask) and bool(int(mask[token // 32]) >> (token % 32) & 1)


def token_limits(sampling: SamplingParams, generated: Sequence[int]) -> TokenLimits | None:
    """None if the request has no limits of its own."""
    if sampling.allowed_token_ids or sampling.bad_words or sampling.thinking_budget is not None:
        return TokenLimits(sampling, generated)
    return None


class TokenLimits:
    """For one sequence."""

    __slots__ = ("_allowed", "_bad_ids", "_bad_words", "_recent", "_thinking")

    # `_bad_words`: those of several tokens, by the one before the last. There may be hundreds, and
    # after most tokens none of them is near its end.

    def __init__(self, sampling: SamplingParams, generated: Sequence[int]) -> None:
        self._bad_ids = tuple(word[0] for word in sampling.bad_words if len(word) == 1)
        longer = [word for word in sampling.bad_words if len(word) > 1]
        self._bad_words: dict[int, list[tuple[int, ...]]] = {}
        for word in longer:
            self._bad_words.setdefault(word[-2], []).append(word)
        self._allowed = (
            bitmask_of(sampling.allowed_token_ids) if sampling.allowed_token_ids else None
        )
        longest = max(map(len, longer), default=1) - 1
        self._recent = _Recent(longest)
        budget = sampling.thinking_budget
        self._thinking = None if budget is None else _ThinkingProgress(budget)
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        """`token` was generated."""
        self._recent.add(token)
        if self._thinking is not None:
            self._thinking.add(token)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether a token that is still unknown may change what comes after it."""
        return bool(self._bad_words) or (self._thinking is not None and not self._thinking.ended)

    def banned(self) -> tuple[int, ...]:
        """As vLLM: the last token of a bad word whose other tokens were just generated."""
        words = self._bad_words.get(self._recent.last, ())
        ends = (word[-1] for word in words if self._recent.ends_with(word[:-1]))
        return (*self._bad_ids, *ends)

    def allowed(self, by_grammar: TokenBitmask | None) -> TokenBitmask | None:
        """None: all. A grammar that does not allow the end of the reasoning prevails."""
        forced = None if self._thinking is None else self._thinking.forced()
        if forced is not None and (by_grammar is None or has_bit(by_grammar, forced)):
            return bitmask_of((forced,))
        return self._allowed if by_grammar is None else by_grammar


class _Recent:
    """The last tokens, as many as are asked for."""

    __slots__ = ("_count", "_tokens")

    def __init__(self, count: int) -> None:
        self._count = count
        self._tokens: tuple[int, ...] = ()

    def add(self, token: int) -> None:
        if self._count:
            self._tokens = (*self._tokens, token)[-self._count :]

    @property
    def last(self) -> int:
        """-1 if there is none."""
        return self._tokens[-1] if self._tokens else -1

    def ends_with(self, tokens: tuple[int, ...]) -> bool:
        return len(tokens) <= len(self._tokens) and self._tokens[-len(tokens) :] == tokens


class _ThinkingProgress:
    """Where a sequence is in its reasoning. After the budget's tokens the end is forced, token by
    token, unless it came by itself before."""

    __slots__ = ("_begun_at", "_budget", "_num_tokens", "_recent", "ended")

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._num_tokens = 0
        self._begun_at = 0 if budget.opened else None
        self._recent = _Recent(max(len(budget.start_ids), len(budget.end_ids)))
        self.ended = not budget.forced_ids

    def add(self, token: int) -> None:
        self._num_tokens += 1
        if self.ended:
            return
        self._recent.add(token)
        if self._begun_at is None:
            if self._recent.ends_with(self._budget.start_ids):
                self._begun_at = self._num_tokens
            return
        num_over = self._num_tokens - self._begun_at - self._budget.tokens
        by_itself = num_over <= 0 and self._recent.ends_with(self._budget.end_ids)
        self.ended = by_itself or num_over >= len(self._budget.forced_ids)

    def forced(self) -> int | None:
        """The only token that may come next, or None."""
        if self.ended or self._begun_at is None:
            return None
        num_over = self._num_tokens - self._begun_at - self._budget.tokens
        return self._budget.forced_ids[num_over] if num_over >= 0 else None
