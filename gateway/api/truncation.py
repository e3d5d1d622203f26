"""Which tokens of a prompt that is too long are kept."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.prompt import Prompt
from gateway.served_model import ModelLimits
from shared.errors import RequestError

LEFT, RIGHT = "left", "right"
"""The side that is cut off. As in transformers, left keeps the last tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """`tokens` are kept; None: as many as leave room for the completion."""

    tokens: int | None
    keeps_end: bool

    def apply(self, prompt: Prompt, *, room: int) -> Prompt:
        """`room`: how many tokens fit. A prompt that is cut was sent as no text."""
        count = room if self.tokens is None else self.tokens
        if len(prompt.ids) <= count:
            return prompt
        ids = prompt.ids[len(prompt.ids) - count :] if self.keeps_end else prompt.ids[:count]
        return Prompt(ids=ids)


def truncation_of(tokens: int | None, side: str | None, limits: ModelLimits) -> Truncation | None:
    """Of the fields `truncate_prompt_tokens` and `truncation_side`. Raises RequestError."""
    if side not in (None, LEFT, RIGHT):
        raise RequestError("truncation_side must be left or right", param="truncation_side")
    if tokens is None:
        return None
    if tokens != -1 and not 1 <= tokens <= limits.context_tokens_max:
        raise RequestError(
            f"truncate_prompt_tokens must be -1, or 1 to {limits.context_tokens_max}",
            param="truncate_prompt_tokens",
        )
    return Truncation(tokens=None if tokens == -1 else tokens, keeps_end=side != RIGHT)
