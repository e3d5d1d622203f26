"""The text of one session: detokenised and ended at a stop string. The token that ended it is left
out unless the request asks for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.detokenizer import Detokenizer, TokenBytes
from gateway.stop_strings import StopStrings
from shared.types import FinishReason


class Piece(NamedTuple):
    """The next text of a stream. It comes from the first `num_ids` of the ids fed: all of them,
    unless a stop string ended the text."""

    text: str
    num_ids: int
    stop: str | None  # the stop string that ended it


class TextStream:
    """Stop strings count only in the text after the first `min_tokens` tokens. `include_stop`: the
    string or token that ends the text is part of it. `follows`: the ids before the first one."""

    def __init__(
        self,
        token_bytes: TokenBytes,
        *,
        follows: Sequence[int] = (),
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(token_bytes, follows=follows)
        self._has_stops = bool(stops)
        self._stops = StopStrings(stops, include_stop=include_stop)
        self._num_unchecked_left = min_tokens if stops else 0
        self._shows_stop = include_stop

    def echo(self, prompt: Sequence[int]) -> str:
        """The text of a prompt's ids, in which no stop string counts. Call it before `feed`."""
        return self._detokenizer.feed(prompt)

    def feed(self, ids: Sequence[int], finish: FinishReason | None = None) -> Piece:
        """Pass `finish` with the last ids. Do not call it again after a `stop` or `finish`."""
        # The rank sends the stop token as an id, but it is not part of the text.
        text_ids = ids[:-1] if finish is FinishReason.STOP and not self._shows_stop else ids
        if not self._has_stops:
            text = self._detokenizer.feed(text_ids)
            return Piece(text + self._detokenizer.flush() if finish else text, len(ids), None)
        text = ""
        for num_ids, token in enumerate(text_ids, start=1):
            passed, stop = self._feed_one(token)
            text += passed
            if stop is not None:
                return Piece(text, num_ids, stop)
        if finish:
            passed, stop = self._stops.feed(self._detokenizer.flush())
            text += passed if stop is not None else passed + self._stops.flush()
            return Piece(text, len(ids), stop)
        return Piece(text, len(ids), None)

    def _feed_one(self, token: int) -> tuple[str, str | None]:
        text = self._detokenizer.feed((token,))
        if self._num_unchecked_left > 0:
            self._num_unchecked_left -= 1
            return text, None
        return self._stops.feed(text)
