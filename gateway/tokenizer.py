"""The checkpoint's tokenizer: turns texts and chats into token ids. Threads work on long ones, so
that no stream waits for another client's prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gateway.chat_template import ChatOptions, ChatTemplate
from gateway.chat_templates import ChatTemplates
from gateway.context_limit import ContextLimit
from gateway.detokenizer import TokenBytes, TokenNames
from gateway.prompt_encoder import PromptEncoder
from gateway.text_encoder import SHORT_CHARS_MAX, EncodedText

INLINE_MESSAGES_MAX = 16

T = TypeVar("T")


class ModelTokenizer:
    """Immutable once loaded, apart from its threads. Special tokens have no text in `token_bytes`;
    in `all_token_bytes` they have their names."""

    def __init__(
        self,
        encoder: PromptEncoder,
        templates: ChatTemplates,
        token_bytes: TokenBytes,
        all_token_bytes: TokenBytes,
        added_ids: Mapping[str, int],
    ) -> None:
        """`added_ids` are the ids of the tokens that the tokenizer adds to its vocabulary, by their
        texts."""
        self._encoder = encoder
        self._templates = templates
        self.token_bytes = token_bytes
        self.all_token_bytes = all_token_bytes
        self.added_ids = added_ids
        self._text_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")
        self._chat_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="chat-template")

    @property
    def num_ids(self) -> int:
        return self.token_bytes.num_ids

    @property
    def template_problems(self) -> Mapping[str, str]:
        """Why chat templates cannot be used, by their names."""
        return self._templates.problems

    @property
    def template_source(self) -> str:
        return self._templates.source

    def chat_template(self, *, has_tools: bool) -> ChatTemplate:
        """The one that a chat takes. Raises RequestError if there is none."""
        return self._templates.choose(has_tools=has_tools)

    def encode_inside(self, text: str) -> tuple[int, ...]:
        """A short text of ours, as in the middle of a prompt."""
        return self._encoder.encode_inside(text)

    def names_showing(self, texts: Collection[str]) -> TokenNames:
        """Of the special tokens, those with these texts appear in texts. Copies the vocabulary."""
        shown = {token: text for text in texts if (token := self.added_ids.get(text)) is not None}
        return TokenNames(self.token_bytes.showing(shown), self.all_token_bytes)

    def names(self, *, with_special: bool) -> TokenNames:
        """`with_special`: special tokens appear in texts."""
        text = self.all_token_bytes if with_special else self.token_bytes
        return TokenNames(text, self.all_token_bytes)

    async def encode(self, text: str, *, tokens_max: int, special: bool = True) -> tuple[int, ...]:
        """A prompt, if `special` with the tokens that the tokenizer puts around it. Raises
        RequestError, before encoding, if the text's length alone shows that it has more than
        `tokens_max` tokens."""
        self._limit(tokens_max).check_chars(len(text))
        return await self._encode(text, lambda: self._encoder.encode(text, special=special))

    async def encode_with_starts(self, text: str, *, tokens_max: int) -> EncodedText:
        """As `encode`."""
        self._limit(tokens_max).check_chars(len(text))
        return await self._encode(text, lambda: self._encoder.encode_with_starts(text))

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions, *, tokens_max: int
    ) -> tuple[int, ...]:
        """The template spells special tokens itself, so none are added. Raises RequestError."""
        template = self.chat_template(has_tools=options.tools is not None)
        limit = self._limit(tokens_max)

        def render() -> str:
            return self._encoder.render(template, messages, options, limit)

        if _is_small(messages, options):
            chat = render()
        else:
            chat = await self._in(self._chat_threads, render)
        return await self._encode(chat, lambda: self._encoder.encode_rendered(chat))

    def close(self) -> None:
        for threads in (self._text_threads, self._chat_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _limit(self, tokens_max: int) -> ContextLimit:
        return ContextLimit(tokens_max=tokens_max, longest_token=self.all_token_bytes.longest)

    async def _encode(self, text: str, encode: Callable[[], T]) -> T:
        if len(text) <= SHORT_CHARS_MAX:
            return encode()
        return await self._in(self._text_threads, encode)

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)


def _is_small(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> bool:
    """Whether rendering is faster than passing it to a thread and back."""
    if len(messages) > INLINE_MESSAGES_MAX or options.tools or options.documents:
        return False
    values = [value for message in messages for value in message.values() if value is not None]
    values += [value for value in options.variables.values() if not isinstance(value, bool)]
    num_chars = sum(len(value) if isinstance(value, str) else SHORT_CHARS_MAX for value in values)
    return num_chars <= SHORT_CHARS_MAX
