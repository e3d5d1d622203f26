"""The HTTP API and whatever is posted to it: each body gets an answer that is the client's fault or
its own, never a crash, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fuzz.budget import Fuzzing
from tests.fuzz.mutator import Mutator
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer

ANSWER_TIMEOUT_S = 60.0  # a hang, and not a busy machine
CONTEXT_TOKENS_MAX = 128  # an answer without a limit of its own ends soon
BODY_BYTES_MAX = 1 << 20
CRASHES = range(500, 503)
PATHS = ("/v1/completions", "/v1/chat/completions")
COMPLETION: dict[str, Any] = {
    "model": MODEL,
    "prompt": "hello",
    "max_tokens": 3,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "n": 2,
    "best_of": 2,
    "seed": 7,
    "stop": ["a", "b"],
    "stop_token_ids": [1],
    "logprobs": 2,
    "prompt_logprobs": 1,
    "echo": True,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"3": 1.5},
    "stream": False,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "guided_regex": "[ab]+",
    "user": "u",
    "ignore_eos": False,
    "min_tokens": 1,
    "return_token_ids": True,
}
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
    ],
    "max_tokens": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "stream": True,
    "stop": "x",
    "chat_template_kwargs": {"a": 1},
    "response_format": {"type": "json_object"},
    "max_completion_tokens": 4,
}


def body(mutator: Mutator, path: str) -> bytes:
    """Some fields of a whole request, some of them changed."""
    whole = COMPLETION if path == PATHS[0] else CHAT
    needed = ("model", "prompt", "messages", "max_tokens")
    fields: Any = {k: v for k, v in whole.items() if k in needed or mutator.rng.random() < 0.3}
    for _ in range(mutator.rng.choice((0, 1, 1, 2, 4))):
        fields = mutator.value(fields)
    try:
        data = json.dumps(fields).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        data = b"{}"
    data = mutator.data(data) if mutator.rng.random() < 0.15 else data
    return data[:BODY_BYTES_MAX]  # of a longer one the connection is closed while it is sent


async def post(harness: GatewayHarness, path: str, data: bytes) -> int:
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    headers = {"content-type": "application/json"}
    async with harness.http.post(
        harness.url + path, data=data, headers=headers, timeout=timeout
    ) as response:
        await response.read()
        return response.status


async def expect_served(harness: GatewayHarness) -> None:
    asked = json.dumps({"model": MODEL, "prompt": [3, 4], "max_tokens": 2}).encode()
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        assert await post(harness, PATHS[0], asked) == 200


@pytest.mark.timeout(0)
async def test_every_body_gets_an_answer_and_others_are_served(tmp_path: Path) -> None:
    fuzzing = Fuzzing("http")
    mutator = Mutator(fuzzing.rng)
    write_tokenizer(tmp_path)
    async with running_gateway(
        tmp_path, num_ranks=2, context_tokens_max=CONTEXT_TOKENS_MAX
    ) as harness:
        await expect_served(harness)
        for data in fuzzing.corpus():
            for path in PATHS:
                assert await post(harness, path, data) not in CRASHES
        for number in fuzzing.rounds():
            path = mutator.rng.choice(PATHS)
            data = body(mutator, path)
            with fuzzing.kept_on_failure(data):
                assert await post(harness, path, data) not in CRASHES
                if number % 20 == 0:
                    await expect_served(harness)
        await expect_served(harness)
    assert fuzzing.num_inputs > 5
