"""Special tokens that a client spells in its texts. If such texts are not trusted, they become
ordinary tokens; those that a chat template writes keep their meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_BEGIN, _END = "\U000f0000", "\U000f0001"
"""Private characters around what a client spelt. Its own ones are removed."""


class Piece(NamedTuple):
    text: str
    is_spelt: bool  # by the client, so it is text


class ControlTokens:
    """The texts that have a meaning of their own for the model."""

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # which never matches
        self._spelt = re.compile(f"({pattern})")
        self._marked = re.compile(f"{_BEGIN}({pattern}){_END}|[{_BEGIN}{_END}]")

    def split(self, text: str) -> list[Piece]:
        """A client's text; its pieces joined are the text."""
        return _pieces(self._spelt.split(text))

    def mark(self, value: Any) -> Any:
        """The value of a request, with marks around control tokens in all its texts."""
        if isinstance(value, str):
            clean = value.replace(_BEGIN, "").replace(_END, "")
            return self._spelt.sub(f"{_BEGIN}\\1{_END}", clean)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def split_marked(self, prompt: str) -> list[Piece]:
        """What a template made of marked values. A template may cut a text between the marks of a
        token; what is left of it then is text, and does not join with its neighbours."""
        return _pieces(self._marked.split(prompt))


def _pieces(parts: list[str | Any]) -> list[Piece]:
    """Of `re.split` with one group, which is every second part, and None for a lone mark."""
    return [Piece(part, bool(index % 2)) for index, part in enumerate(parts) if part]
