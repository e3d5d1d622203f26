"""The HTTP API and whatever is posted to it: each body gets an answer that is the client's fault or
its own, never a crash, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fuzz.budget import Fuzzing
from tests.fuzz.http_bodies import BODIES, HEADERS, NEEDED
from tests.fuzz.mutator import TEXTS, Mutator
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer

ANSWER_TIMEOUT_S = 60.0  # a hang, and not a busy machine
CONTEXT_TOKENS_MAX = 128  # an answer without a limit of its own ends soon
BODY_BYTES_MAX = 1 << 20
CRASHES = range(500, 503)


def body(mutator: Mutator, path: str) -> bytes:
    """Some fields of a whole request, some of them changed."""
    whole, rng = BODIES[path], mutator.rng
    share = rng.choice((0.05, 0.3))
    fields: Any = {k: v for k, v in whole.items() if k in NEEDED or rng.random() < share}
    for _ in range(mutator.rng.choice((0, 1, 1, 2, 4))):
        fields = mutator.value(fields)
    try:
        data = json.dumps(fields).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        data = b"{}"
    data = mutator.data(data) if mutator.rng.random() < 0.15 else data
    return data[:BODY_BYTES_MAX]  # of a longer one the connection is closed while it is sent


def headers_of(mutator: Mutator) -> dict[str, str]:
    """Mostly none."""
    rng = mutator.rng
    if rng.random() < 0.8:
        return {}
    text = rng.choice([text for text in TEXTS if text.isprintable() and text.isascii()])
    return {rng.choice(HEADERS): rng.choice((text, "1e400", "nan", "-1", "gzip", "*/*"))}


async def post(
    harness: GatewayHarness, path: str, data: bytes, headers: Mapping[str, str] | None = None
) -> int:
    timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
    async with harness.http.post(
        harness.url + path,
        data=data,
        headers={"content-type": "application/json"} | dict(headers or {}),
        timeout=timeout,
    ) as response:
        await response.read()
        return response.status


async def expect_served(harness: GatewayHarness) -> None:
    asked = json.dumps({"model": MODEL, "prompt": [3, 4], "max_tokens": 2}).encode()
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        assert await post(harness, "/v1/completions", asked) == 200


@pytest.mark.timeout(0)
async def test_every_body_gets_an_answer_and_others_are_served(tmp_path: Path) -> None:
    fuzzing = Fuzzing("http")
    mutator, statuses = Mutator(fuzzing.rng), Counter[int]()
    write_tokenizer(tmp_path)
    async with running_gateway(
        tmp_path, num_ranks=2, context_tokens_max=CONTEXT_TOKENS_MAX
    ) as harness:
        await expect_served(harness)
        for data in fuzzing.corpus():
            for path in BODIES:
                assert await post(harness, path, data) not in CRASHES
        for number in fuzzing.rounds():
            path = mutator.rng.choice(list(BODIES))
            data, headers = body(mutator, path), headers_of(mutator)
            with fuzzing.kept_on_failure(data):
                status = await post(harness, path, data, headers)
                assert status not in CRASHES, (path, headers)
                statuses[status] += 1
                if number % 20 == 0:
                    await expect_served(harness)
        await expect_served(harness)
    print(f"statuses: {dict(statuses)}")
    assert fuzzing.num_inputs > 5
