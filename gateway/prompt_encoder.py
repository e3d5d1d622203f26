"""Prompts to token ids: texts as a client sends them, and chats through their template. Whether
special tokens that a client spells count as such is decided here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from gateway.chat_template import ChatOptions, ChatTemplate
from gateway.context_limit import ContextLimit
from gateway.control_tokens import ControlTokens, Piece
from gateway.text_encoder import EncodedText, TextEncoder


class PromptEncoder(Protocol):
    """Immutable; threads may share it. None of its methods awaits anything."""

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """`special`: with the tokens that the tokenizer puts around a prompt."""
        ...

    def encode_with_starts(self, text: str) -> EncodedText:
        """As `encode` with `special`."""
        ...

    def encode_inside(self, text: str) -> tuple[int, ...]:
        """A text of ours from the middle of a prompt, in which special tokens count."""
        ...

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions,
        limit: ContextLimit,
    ) -> str:
        """A chat, to be encoded by `encode_rendered`. Raises RequestError."""
        ...

    def encode_rendered(self, chat: str) -> tuple[int, ...]: ...


class TrustingEncoder:
    """Special tokens in texts are special tokens, as in transformers."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        return self._encoder.ids(text, special=special)

    def encode_with_starts(self, text: str) -> EncodedText:
        return self._encoder.with_starts(text, special=True)

    def encode_inside(self, text: str) -> tuple[int, ...]:
        return self._encoder.inside(text).ids

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions,
        limit: ContextLimit,
    ) -> str:
        return template.render(messages, options, limit=limit)

    def encode_rendered(self, chat: str) -> tuple[int, ...]:
        return self._encoder.ids(chat, special=False)


class DistrustingEncoder:
    """Control tokens in a client's texts are encoded by `plain`, which knows no special tokens, as
    with `sanitize_control_tokens` in transformers. `around` are the tokens that the tokenizer puts
    before and after a prompt, `id_of` the ids of the control tokens."""

    def __init__(
        self,
        encoder: TextEncoder,
        plain: TextEncoder,
        *,
        around: tuple[tuple[int, ...], tuple[int, ...]],
        id_of: Mapping[str, int],
    ) -> None:
        self._encoder = encoder
        self._plain = plain
        self._before, self._after = around
        self._id_of = dict(id_of)
        self._control = ControlTokens(id_of)

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        if special:
            return self.encode_with_starts(text).ids
        return self._join(self._control.split(text)).ids

    def encode_with_starts(self, text: str) -> EncodedText:
        ids, starts = self._join(self._control.split(text))
        return EncodedText(
            (*self._before, *ids, *self._after),
            (*(0 for _ in self._before), *starts, *(len(text) for _ in self._after)),
        )

    def encode_inside(self, text: str) -> tuple[int, ...]:
        return self._encoder.inside(text).ids

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions,
        limit: ContextLimit,
    ) -> str:
        mark = self._control.mark
        marked = replace(
            options,
            tools=mark(options.tools),
            documents=mark(options.documents),
            variables=mark(options.variables),
        )
        return template.render(mark(messages), marked, limit=limit)

    def encode_rendered(self, chat: str) -> tuple[int, ...]:
        return self._join(self._control.split_marked(chat)).ids

    def _join(self, pieces: Sequence[Piece]) -> EncodedText:
        ids: list[int] = []
        starts: list[int] = []
        begin = 0
        for piece in pieces:
            encoded = self._encode_piece(piece, is_first=begin == 0)
            ids += encoded.ids
            starts += (begin + start for start in encoded.starts)
            begin += len(piece.text)
        return EncodedText(tuple(ids), tuple(starts))

    def _encode_piece(self, piece: Piece, *, is_first: bool) -> EncodedText:
        if not piece.is_spelt:
            if is_first:
                return self._encoder.with_starts(piece.text, special=False)
            return self._encoder.inside(piece.text)
        encoded = self._plain.inside(piece.text)
        if self._id_of[piece.text] not in encoded.ids:
            return encoded
        # A vocabulary may hold the token as an ordinary word, too. Cut in two, it is none.
        parts = [self._plain.inside(piece.text[:1]), self._plain.inside(piece.text[1:])]
        return EncodedText(
            (*parts[0].ids, *parts[1].ids),
            (*parts[0].starts, *(1 + start for start in parts[1].starts)),
        )
