"""The texts of a request as tokens: its prompts, bad words, and the marks of its reasoning."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from gateway.api.answer_plan import AnswerPlan
from gateway.api.bodies import ChatBody, GenerationBody
from gateway.api.chat_request import read_budget
from gateway.api.fields import bad_word_ids
from gateway.api.requests import RequestOptions
from gateway.prompt import Prompt, SentText
from gateway.served_model import ModelLimits, ServedModel


async def with_tokens(
    body: GenerationBody,
    options: RequestOptions,
    served: ServedModel,
    plan: AnswerPlan | None = None,
) -> RequestOptions:
    """With what the tokenizer and the chat's plan add to the sampling, which is seldom anything.
    Raises RequestError."""
    sampling = options.sampling
    if body.bad_words:
        encode = served.tokenizer.encode_inside
        words = await asyncio.to_thread(bad_word_ids, body.bad_words, encode)
        sampling = replace(sampling, bad_words=words)
    if plan is not None and isinstance(body, ChatBody):
        budget = read_budget(body, plan, served)
        if budget is not None:
            sampling = replace(sampling, thinking_budget=budget)
    return options if sampling is options.sampling else replace(options, sampling=sampling)


async def encoded_prompt(
    served: ServedModel, prompt: str | tuple[int, ...], options: RequestOptions, limits: ModelLimits
) -> Prompt:
    """An echo needs the text, and its log-probabilities where each token begins in it."""
    if not isinstance(prompt, str):
        return Prompt(ids=prompt)
    tokenizer, tokens_max = served.tokenizer, options.prompt_tokens_max(limits)
    if options.echo and options.sampling.logprobs is not None:
        ids, starts = await tokenizer.encode_with_starts(prompt, tokens_max=tokens_max)
        return Prompt(ids=ids, sent=SentText(text=prompt, starts=starts))
    ids = await tokenizer.encode(prompt, tokens_max=tokens_max)
    return Prompt(ids=ids, sent=SentText(text=prompt))
