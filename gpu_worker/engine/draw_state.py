"""What the next draw of a sequence depends on besides its logits and its grammar, made ready for
all its steps: counts for penalties, a bias, limits of its own. A function of the request and of
the tokens so far, so a continuation on another rank has the same."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_worker.engine.draw import LogitBias, TokenCounts, count_tokens, logit_bias_of
from gpu_worker.engine.token_limits import TokenLimits, token_limits
from shared.types import SamplingParams


class DrawState:
    """Each part is None if the request does not need it."""

    __slots__ = ("bias", "counts", "limits")

    def __init__(
        self, counts: TokenCounts | None, bias: LogitBias | None, limits: TokenLimits | None
    ) -> None:
        self.counts = counts
        self.bias = bias
        self.limits = limits

    @classmethod
    def of(
        cls, sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
    ) -> DrawState:
        return cls(
            count_tokens(sampling, prompt, generated),
            logit_bias_of(sampling),
            token_limits(sampling, generated),
        )

    @property
    def depends_on_tokens(self) -> bool:
        """Whether a token that is still unknown may change the draw after it."""
        return self.counts is not None or (
            self.limits is not None and self.limits.depends_on_tokens
        )

    def add(self, token: int) -> None:
        """`token` was generated."""
        if self.counts is not None:
            self.counts.add(token)
        if self.limits is not None:
            self.limits.add(token)
