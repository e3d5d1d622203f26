"""Log-probabilities are shaped in slices, between which the event loop runs; slices leave no trace
in the JSON. Those of a prompt are shaped once for all its choices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import msgspec

from gateway.api.logprobs import (
    SLICE_ENTRIES,
    CompletionLogprobs,
    PromptLogprobs,
    ScoredToken,
    chat_logprobs,
)
from gateway.detokenizer import TokenBytes, TokenNames
from shared.wire import TokenLogprob

WORDS = TokenBytes({chr(97 + i): i for i in range(26)}, frozenset())
NAMES = TokenNames(WORDS, WORDS)
NUM_TOP = 19
NUM_TOKENS = 300
SLICES = NUM_TOKENS * (NUM_TOP + 1) / SLICE_ENTRIES


def scored(number: int) -> list[ScoredToken]:
    return [
        (
            i % 26,
            TokenLogprob(
                logprob=-float(i),
                rank=2,
                top=tuple((j, -j / 8) for j in range(NUM_TOP)),
            ),
        )
        for i in range(number)
    ]


async def turns_of_others(shaping: Coroutine[Any, Any, msgspec.Raw]) -> tuple[Any, int]:
    """What is shaped, and how often another task ran meanwhile."""
    turns = 0
    done = False

    async def other() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await asyncio.sleep(0)
    turns = 0
    shaped = await shaping
    done = True
    await task
    return json.loads(msgspec.json.encode(shaped)), turns


async def test_a_chats_list_is_whole_and_others_run_meanwhile() -> None:
    shaped, turns = await turns_of_others(chat_logprobs(NAMES, scored(NUM_TOKENS), NUM_TOP))
    assert turns >= SLICES - 2
    assert shaped["refusal"] is None
    assert [entry["logprob"] for entry in shaped["content"]] == [-i for i in range(NUM_TOKENS)]
    assert all(len(entry["top_logprobs"]) == NUM_TOP for entry in shaped["content"])


async def test_a_completions_lists_are_whole_and_others_run_meanwhile() -> None:
    writer = CompletionLogprobs(NAMES, NUM_TOP)
    first: list[ScoredToken] = [(0, None)]
    shaped, turns = await turns_of_others(writer.next(first + scored(NUM_TOKENS - 1)))
    assert turns >= SLICES - 2
    assert {len(column) for column in shaped.values()} == {NUM_TOKENS}
    assert shaped["token_logprobs"][:3] == [None, 0, -1]
    assert shaped["top_logprobs"][0] is None
    assert shaped["text_offset"] == list(range(NUM_TOKENS))
    after, _ = await turns_of_others(writer.next(scored(1)))
    assert after["text_offset"] == [NUM_TOKENS]


async def test_a_prompts_list_is_shaped_once() -> None:
    tokens, scores = zip(*scored(NUM_TOKENS), strict=True)
    of_prompt = PromptLogprobs(NAMES, tokens, NUM_TOP)
    of_prompt.add(scores[1:100])
    of_prompt.add(scores[100:])
    shaped, turns = await turns_of_others(of_prompt.shaped())
    assert turns >= SLICES - 2
    assert shaped[0] is None
    assert len(shaped) == NUM_TOKENS
    assert shaped[25]["25"] == {"logprob": -25, "rank": 2, "decoded_token": "z"}
    again, turns = await turns_of_others(of_prompt.shaped())
    assert again == shaped
    assert turns <= 1


async def test_nothing_gives_empty_lists() -> None:
    assert (await turns_of_others(chat_logprobs(NAMES, [], 3)))[0]["content"] == []
    assert (await turns_of_others(PromptLogprobs(NAMES, (1,), 3).shaped()))[0] == [None]
