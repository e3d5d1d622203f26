"""The checkpoint's tokenizer: turns texts and chats into token ids. Threads encode long texts, so
that no stream waits for another client's prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from gateway.chat_template import ChatTemplate, load_chat_template
from gateway.detokenizer import TokenBytes, TokenNames
from shared.errors import CheckpointError, RequestError

INLINE_CHARS_MAX = 1024
"""Up to this length, encoding is faster than passing the text to a thread and back."""


class ModelTokenizer:
    """Immutable once loaded, apart from its threads. Special tokens have no text in `token_bytes`;
    in `all_token_bytes` they have their names."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        token_bytes: TokenBytes,
        all_token_bytes: TokenBytes,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.token_bytes = token_bytes
        self.all_token_bytes = all_token_bytes
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")

    @property
    def num_ids(self) -> int:
        return self.token_bytes.num_ids

    def names(self, *, with_special: bool) -> TokenNames:
        """`with_special`: special tokens appear in texts."""
        text = self.all_token_bytes if with_special else self.token_bytes
        return TokenNames(text, self.all_token_bytes)

    async def encode(self, text: str, *, tokens_max: int, special: bool = True) -> tuple[int, ...]:
        """Raises RequestError, before encoding, if the text's length alone shows that it has more
        than `tokens_max` tokens."""
        least = len(text) // max(self.token_bytes.longest, 1)
        if least > tokens_max:
            raise context_exceeded(f"at least {least}", tokens_max)
        if len(text) <= INLINE_CHARS_MAX:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_long, text, special)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None,
        *,
        tokens_max: int,
    ) -> tuple[int, ...]:
        """The template spells special tokens itself, so none are added. Raises RequestError."""
        if self._template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        text = self._template.render(messages, options)
        return await self.encode(text, tokens_max=tokens_max, special=False)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode_long(self, text: str, special: bool) -> tuple[int, ...]:
        """Uses the batch call: unlike `encode`, it releases the GIL."""
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return tuple(encoding.ids)


def context_exceeded(num_tokens: int | str, tokens_max: int) -> RequestError:
    return RequestError(
        f"This model's maximum context length is {tokens_max} tokens, but the request needs "
        f"{num_tokens} for prompt and completion. Shorten the prompt or max_tokens.",
        code="context_length_exceeded",
    )


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """Blocks. Raises CheckpointError if the file is missing or is not byte-level BPE."""
    path = folder / "tokenizer.json"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        decoder = msgspec.json.decode(raw).get("decoder")
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    if not _is_byte_level(decoder):
        raise CheckpointError(f"{path} is not byte-level BPE, the only kind that Starfish supports")
    added = tokenizer.get_added_tokens_decoder()
    special = {token_id: token.content for token_id, token in added.items() if token.special}
    token_bytes = TokenBytes(tokenizer.get_vocab(with_added_tokens=True), special.keys())
    template = load_chat_template(folder)
    return ModelTokenizer(tokenizer, template, token_bytes, token_bytes.showing(special))


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    return any(part.get("type") == "ByteLevel" for part in parts or [])
