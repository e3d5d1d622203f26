"""The length of a model's context as a bound on texts: what cannot fit is refused before anybody
works on it."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLimit:
    """`longest_token` is in bytes; 0 if unknown."""

    tokens_max: int
    longest_token: int

    def check_chars(self, num_chars: int) -> None:
        """Raises RequestError if a text of this length surely has too many tokens."""
        least = num_chars // max(self.longest_token, 1)
        if least > self.tokens_max:
            raise context_exceeded(f"at least {least}", self.tokens_max)


def context_exceeded(num_tokens: int | str, tokens_max: int) -> RequestError:
    return RequestError(
        f"This model's maximum context length is {tokens_max} tokens, but the request needs "
        f"{num_tokens} for prompt and completion. Shorten the prompt or max_tokens.",
        code="context_length_exceeded",
    )
