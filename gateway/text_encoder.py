"""Texts to token ids by a checkpoint's tokenizer, and the character at which each token begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

SHORT_CHARS_MAX = 1024
"""Up to this length, encoding is faster than passing the text to a thread and back, and the call
that keeps the GIL is faster than the one that does not."""

_ANCHOR = "\n"
"""Put before a text that does not begin a prompt, and taken off again: SentencePiece's tokenizers
put a space before the first word of a text."""


class EncodedText(NamedTuple):
    """`starts[i]` is the index in the text of the first character of token i. A character that
    several tokens share counts for all of them."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]


class TextEncoder:
    """Immutable; threads may share it. Long texts are encoded without the GIL."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor_ids = self.ids(_ANCHOR, special=False)

    def ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        """`special`: with the tokens that the tokenizer puts around a prompt."""
        if len(text) <= SHORT_CHARS_MAX:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return tuple(encoding.ids)

    def with_starts(self, text: str, *, special: bool) -> EncodedText:
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=special)
        return EncodedText(tuple(encoding.ids), tuple(_starts(text, encoding)))

    def inside(self, text: str) -> EncodedText:
        """A text from the middle of a prompt: nothing is put before it."""
        ids, starts = self.with_starts(_ANCHOR + text, special=False)
        num = len(self._anchor_ids)
        if ids[:num] != self._anchor_ids:  # the anchor became one token with what follows
            return self.with_starts(text, special=False)
        moved = (max(start - len(_ANCHOR), 0) for start in starts[num:])
        return EncodedText(ids[num:], tuple(moved))


def _starts(text: str, encoding: Encoding) -> Iterable[int]:
    """Offsets may leave out the spaces before a word, which are its token's. They may also leave
    out the rest of a character that a normaliser composed: it belongs to the token before. Tokens
    that are not from the text have no offsets."""
    ended = 0
    for (start, end), inserted in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        if inserted or text[ended:start].isspace():
            yield ended
        else:
            yield start
        ended = max(ended, end)
