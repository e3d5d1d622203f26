"""`/tokenize` and `/detokenize`, in the shapes that vLLM has."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.api.bodies import ChatBody
from gateway.api.chat_request import read_chat
from gateway.detokenizer import Detokenizer
from gateway.served_model import ModelLimits, ServedModel
from shared.errors import RequestError

DETOKENIZE_MAX = 1 << 20
"""Limit on the ids of one request."""


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[int]


async def tokenize(
    served: ServedModel, body: TokenizeBody, limits: ModelLimits, *, chars_max: int
) -> dict[str, Any]:
    """Counts any text of up to `chars_max` characters, also one that is longer than the context.
    Raises RequestError."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("pass either prompt or messages", param="prompt")
    if body.prompt is not None:
        ids = await served.tokenizer.encode(
            body.prompt, tokens_max=chars_max, special=body.add_special_tokens
        )
    else:
        chat = read_chat(_chat_body(body), served)
        ids = await served.tokenizer.encode_chat(chat.messages, chat.options, tokens_max=chars_max)
    names = served.tokenizer.names(with_special=True)
    return {
        "count": len(ids),
        "max_model_len": limits.context_tokens_max,
        "tokens": ids,
        "token_strs": [names.name(token) for token in ids] if body.return_token_strs else None,
    }


def _chat_body(body: TokenizeBody) -> ChatBody:
    """So that a chat has the tokens here that it has when it is answered."""
    return ChatBody(
        messages=body.messages or [],
        tools=body.tools,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )


def detokenize(served: ServedModel, body: DetokenizeBody, limits: ModelLimits) -> dict[str, Any]:
    """Special tokens are spelt by their names. Raises RequestError."""
    ids = body.tokens
    if len(ids) > DETOKENIZE_MAX:
        raise RequestError(f"at most {DETOKENIZE_MAX} tokens", param="tokens")
    if ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
        raise RequestError(f"token ids must be from 0 to {limits.vocab_size - 1}", param="tokens")
    text = Detokenizer(served.tokenizer.names(with_special=True).text)
    return {"prompt": text.feed(ids) + text.flush()}
