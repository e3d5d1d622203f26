"""How the tokens of a vocabulary spell bytes, as the decoder in tokenizer.json says: as byte-level
BPE does, or as SentencePiece does with a token for each byte."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDecoder:
    """`byte_fallback`: a token is text, or as `<0xE2>` a byte; `replacements` are made in texts,
    and so many spaces as `strip_left` are left out at the start of the whole. Otherwise each
    character of a token is a byte."""

    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_left: int = 0

    def is_byte(self, token: str) -> bool:
        return self.byte_fallback and _BYTE_TOKEN.fullmatch(token) is not None

    def bytes_of(self, token: str) -> bytes:
        if not self.byte_fallback:
            return _byte_level_bytes(token)
        if (found := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(found[1], 16)])
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()


def read_token_decoder(plain: Mapping[str, Any]) -> TokenDecoder:
    """`plain` is tokenizer.json. Raises CheckpointError for a decoder of another kind."""
    decoder = plain.get("decoder")
    parts = _parts(decoder)
    kinds = [part.get("type") for part in parts]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "ByteFallback", "Fuse"}:
        return TokenDecoder()
    if "ByteFallback" not in kinds:
        raise _refusal(f"its decoder is {' and '.join(map(str, kinds)) or 'missing'}")
    replacements: list[tuple[str, str]] = []
    strip_left, is_fused = 0, False
    for part in parts:
        match part:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if is_fused:
                strip_left = start
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "ByteFallback"}:
                pass
            case _:
                raise _refusal(f"its decoder has a part that is not known: {part!r:.200}")
    return TokenDecoder(byte_fallback=True, replacements=tuple(replacements), strip_left=strip_left)


def _parts(decoder: Any) -> list[Mapping[str, Any]]:
    if not isinstance(decoder, Mapping):
        return []
    parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return [part for part in parts or [] if isinstance(part, Mapping)]


def _refusal(reason: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json is neither byte-level BPE nor BPE with byte fallback ({reason}); Starfish "
        "serves these kinds"
    )


def byte_characters() -> dict[int, str]:
    """The printable character for each byte in a byte-level vocabulary: printable Latin-1 bytes map
    to themselves, the others to the code points from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    table.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    return table


_BYTE_OF = {char: byte for byte, char in byte_characters().items()}


def _byte_level_bytes(token: str) -> bytes:
    """A token with a character outside the table is an added token, spelt as plain text."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()
