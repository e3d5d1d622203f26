"""At which character of a choice's text each of its tokens begins."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.detokenizer import Detokenizer, TokenBytes


class TokenOffsets:
    """`follows`: the ids before the first one that is asked for. The text before that one has
    `begin` characters."""

    def __init__(
        self, token_bytes: TokenBytes, *, follows: Sequence[int] = (), begin: int = 0
    ) -> None:
        self._text = Detokenizer(token_bytes, follows=follows)
        self._offset = begin

    def next(self, token: int) -> int:
        self._offset += len(self._text.end_before(token))
        offset = self._offset
        self._offset += len(self._text.feed((token,)))
        return offset
