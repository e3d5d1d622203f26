"""A prompt: its token ids, and the text as which a client sent it. Ids do not tell that text:
tokenizers normalise texts, and special tokens have none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SentText:
    """`starts[i]` is the index of the character at which the prompt's token i begins; empty if
    nobody asks for it."""

    text: str
    starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`sent` is None if the prompt was sent as ids, or as a chat."""

    ids: tuple[int, ...]
    sent: SentText | None = None
