"""Turns a stream of token ids into text, for byte-level BPE: a token is bytes, and a character may
be split across tokens. Linear in the number of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple


class TokenBytes:
    """The bytes of every token of a vocabulary, and which tokens are special. Shared by all
    streams."""

    def __init__(self, vocabulary: Mapping[str, int], special_ids: AbstractSet[int]) -> None:
        byte_of = {char: byte for byte, char in byte_characters().items()}
        self._bytes: list[bytes] = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            if token_id not in special_ids:
                self._bytes[token_id] = _token_bytes(token, byte_of)

        self.longest = max(map(len, self._bytes), default=0)

    def showing(self, texts: Mapping[int, str]) -> TokenBytes:
        """The same vocabulary, in which the ids of `texts` have these texts."""
        shown = TokenBytes({}, frozenset())
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
    """The text of one stream. Its pieces joined are the text that decoding all ids at once
    gives."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int]) -> str:
        """The characters that these ids complete."""
        return self._utf8.decode(self._token_bytes.join(ids))

    def flush(self) -> str:
        """Call at the end: U+FFFD if the last character is incomplete."""
        return self._utf8.decode(b"", final=True)


def byte_characters() -> dict[int, str]:
    """The printable character for each byte in a byte-level vocabulary: printable Latin-1 bytes map
    to themselves, the others to the code points from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    table.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    return table


def _token_bytes(token: str, byte_of: Mapping[str, int]) -> bytes:
    """A token with a character outside the table is an added token, spelt as plain text."""
    try:
        return bytes([byte_of[char] for char in token])
    except KeyError:
        return token.encode()
