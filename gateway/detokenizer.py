"""Turns a stream of token ids into text: a token is bytes, and a character may be split across
tokens. Linear in the number of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from gateway.token_decoder import TokenDecoder


class TokenBytes:
    """The bytes of every token of a vocabulary, and which tokens are special. Shared by all
    streams."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        special_ids: AbstractSet[int],
        decoder: TokenDecoder | None = None,
    ) -> None:
        decoder = decoder or TokenDecoder()
        self._bytes: list[bytes] = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            if token_id not in special_ids:
                self._bytes[token_id] = decoder.bytes_of(token)
        self.decoder = decoder
        self.single_byte_ids = frozenset(
            token_id
            for token, token_id in vocabulary.items()
            if token_id not in special_ids and decoder.is_byte(token)
        )
        """Tokens of a vocabulary with byte fallback that are one byte."""
        self.longest = max(map(len, self._bytes), default=0)

    def showing(self, texts: Mapping[int, str]) -> TokenBytes:
        """The same vocabulary, in which the ids of `texts` have these texts."""
        shown = TokenBytes({}, frozenset(), self.decoder)
        shown.single_byte_ids = self.single_byte_ids
        shown._bytes = self._bytes.copy()
        for token_id, text in texts.items():
            shown._bytes[token_id] = text.encode()
        shown.longest = max(map(len, shown._bytes), default=0)
        return shown

    @property
    def num_ids(self) -> int:
        return len(self._bytes)

    def join(self, ids: Iterable[int]) -> bytes:
        """Special tokens, and ids that the tokenizer does not know, have no text."""
        known = self._bytes
        return b"".join([known[i] for i in ids if 0 <= i < len(known)])


class TokenNames(NamedTuple):
    """Tokens as a client sees them. Texts are made of `text`; `name_bytes` always includes the
    special tokens."""

    text: TokenBytes
    name_bytes: TokenBytes

    def name(self, token: int) -> str:
        return self.name_bytes.join((token,)).decode(errors="replace")

    def unique_name(self, token: int) -> str:
        """For names that are keys: a part of a character is spelt as its bytes."""
        raw = self.name_bytes.join((token,))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Detokenizer:
    """The text of one stream. Its pieces joined are the text that decoding all ids at once gives.
    `follows`: the ids before the first one, whose text is not shown."""

    def __init__(self, token_bytes: TokenBytes, *, follows: Sequence[int] = ()) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_split = False  # the last bytes may be the beginning of a character
        self._fallback = token_bytes.decoder.byte_fallback
        self._byte_run = bytearray()
        strips = self._fallback and not token_bytes.join(follows)
        self._spaces_to_strip = token_bytes.decoder.strip_left if strips else 0

    def feed(self, ids: Sequence[int]) -> str:
        """The characters that these ids complete."""
        if self._fallback:
            return self._stripped("".join([self._feed_one(token) for token in ids]))
        raw = self._token_bytes.join(ids)
        if not self._is_split and raw.isascii():
            return raw.decode()  # most text is, and the incremental decoder takes much longer
        text = self._utf8.decode(raw)
        self._is_split = bool(self._utf8.getstate()[0])
        return text

    def end_before(self, token: int) -> str:
        """The characters that are complete because `token` is the next one. `feed` does not return
        them again."""
        if not self._byte_run or token in self._token_bytes.single_byte_ids:
            return ""
        return self._stripped(self._end_of_byte_run())

    def flush(self) -> str:
        """Call at the end: U+FFFD if the last character is incomplete."""
        if self._fallback:
            return self._stripped(self._end_of_byte_run())
        return self._utf8.decode(b"", final=True)

    def _feed_one(self, token: int) -> str:
        raw = self._token_bytes.join((token,))
        if token in self._token_bytes.single_byte_ids:
            self._byte_run += raw
            return ""
        return self._end_of_byte_run() + raw.decode() if raw else ""

    def _end_of_byte_run(self) -> str:
        """Byte tokens in a row are text only together: if they are no UTF-8, each of them is
        U+FFFD, also one that belongs to a whole character. So their text comes with their end."""
        if not self._byte_run:
            return ""
        run = bytes(self._byte_run)
        self._byte_run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        if not self._spaces_to_strip or not text:
            return text
        rest = text.lstrip(" ")
        num_spaces = min(len(text) - len(rest), self._spaces_to_strip)
        self._spaces_to_strip = 0 if rest else self._spaces_to_strip - num_spaces
        return text[num_spaces:]
