"""`/tokenize` and `/detokenize`, in the shapes that vLLM has. A thread makes their answers: one may
have millions of ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gateway.api.bodies import ChatBody
from gateway.api.chat_request import read_chat
from gateway.api.json_list import JsonList
from gateway.detokenizer import Detokenizer
from gateway.served_model import ModelLimits, ServedModel
from shared.errors import RequestError

DETOKENIZE_MAX = 1 << 17
"""Limit on the ids of one request."""
_ENCODED_IN_ONE = 1 << 14
"""Ids. While they are encoded, no other thread runs."""


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]


async def tokenize(
    served: ServedModel, body: TokenizeBody, limits: ModelLimits, *, chars_max: int
) -> bytes:
    """The answer, as JSON. Counts any text of up to `chars_max` characters, also one that is longer
    than the context. Raises RequestError."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("pass either prompt or messages", param="prompt")
    if body.prompt is not None:
        ids = await served.tokenizer.encode(
            body.prompt, tokens_max=chars_max, special=body.add_special_tokens is not False
        )
    else:
        chat = read_chat(_chat_body(body), served)
        ids = await served.tokenizer.encode_chat(chat.messages, chat.options, tokens_max=chars_max)
    name = served.tokenizer.names(with_special=True).name if body.return_token_strs else None
    return await asyncio.to_thread(_token_answer, ids, limits.context_tokens_max, name)


def _token_answer(
    ids: Sequence[int], context_tokens_max: int, name: Callable[[int], str] | None
) -> bytes:
    tokens, texts = JsonList(), JsonList()
    for begin in range(0, len(ids), _ENCODED_IN_ONE):
        part = ids[begin : begin + _ENCODED_IN_ONE]
        tokens.add(part)
        if name is not None:
            texts.add(list(map(name, part)))
    return msgspec.json.encode(
        {
            "count": len(ids),
            "max_model_len": context_tokens_max,
            "tokens": msgspec.Raw(tokens.whole()),
            "token_strs": None if name is None else msgspec.Raw(texts.whole()),
        }
    )


def _chat_body(body: TokenizeBody) -> ChatBody:
    """So that a chat has the tokens here that it has when it is answered."""
    return ChatBody(
        messages=body.messages or [],
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )


async def detokenize(served: ServedModel, body: DetokenizeBody, limits: ModelLimits) -> bytes:
    """The answer, as JSON. Special tokens are spelt by their names. Raises RequestError."""
    ids = body.tokens
    if len(ids) > DETOKENIZE_MAX:
        raise RequestError(f"at most {DETOKENIZE_MAX} tokens", param="tokens")
    text = Detokenizer(served.tokenizer.names(with_special=True).text)
    return await asyncio.to_thread(_text_answer, text, ids, limits.vocab_size)


def _text_answer(text: Detokenizer, ids: Sequence[int], vocab_size: int) -> bytes:
    """Raises RequestError."""
    parts: list[str] = []
    for begin in range(0, len(ids), _ENCODED_IN_ONE):
        part = ids[begin : begin + _ENCODED_IN_ONE]
        if not 0 <= min(part) <= max(part) < vocab_size:
            raise RequestError(f"token ids must be from 0 to {vocab_size - 1}", param="tokens")
        parts.append(text.feed(part))
    return msgspec.json.encode({"prompt": "".join(parts) + text.flush()})
