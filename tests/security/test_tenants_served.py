"""A whole instance with API keys: one client fills it and sends another's prompts; the other is
served, and goes on after a `kill -9`."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cli.keys import add_entry, key_entry
from cli.up.model import shipped_model
from shared.api_key import new_api_key
from tests.support.cluster import Cluster, running_cluster

PROMPT = list(range(100, 180))
TOKENS = 60


async def complete(cluster: Cluster, key: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True, **fields}
    timeout, headers = aiohttp.ClientTimeout(total=120), {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as http,
        http.post(f"{cluster.url}/v1/completions", json=body) as response,
    ):
        return {"status": response.status, **await response.json()}


async def cached_tokens(cluster: Cluster, key: str, **fields: Any) -> int:
    answer = await complete(cluster, key, **fields)
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


async def flood(cluster: Cluster, key: str) -> list[int]:
    """Statuses of ten requests of 64 choices each, until somebody cancels it."""
    wishes = [complete(cluster, key, prompt=[7 + i], n=64, max_tokens=400) for i in range(10)]
    return [answer["status"] for answer in await asyncio.gather(*wishes)]


@pytest.mark.timeout(300)
async def test_a_client_learns_nothing_of_another_and_is_not_held_up_by_it(tmp_path: Path) -> None:
    keys, alice, mallory = tmp_path / "keys.toml", new_api_key(), new_api_key()
    add_entry(keys, "alice", key_entry("alice", alice))
    add_entry(keys, "mallory", key_entry("mallory", mallory))
    model = shipped_model()
    assert model is not None
    async with running_cluster(
        tmp_path / "run", model, ranks=2, flags=("--api-key-file", str(keys)), api_key=alice
    ) as cluster:
        assert (await complete(cluster, "wrong"))["status"] == 401

        # What one has sent, another does not find; its own it does, unless it asked for a salt.
        assert await cached_tokens(cluster, alice) == 0
        assert await cached_tokens(cluster, alice) >= 64
        for fields in ({}, {"cache_salt": "x"}):
            assert await cached_tokens(cluster, mallory, **fields) == 0
        assert await cached_tokens(cluster, alice, cache_salt="x") == 0

        undisturbed = await cluster.stream(PROMPT, max_tokens=TOKENS)
        assert len(undisturbed.token_ids) == TOKENS, undisturbed.error

        # While more is asked for than fits, the other's streams run, and survive a death.
        flooding = asyncio.create_task(flood(cluster, mallory))
        await asyncio.sleep(2.0)
        killed = asyncio.Event()
        streams = [
            asyncio.create_task(
                cluster.stream(
                    PROMPT, max_tokens=TOKENS, on_token=lambda n: killed.set() if n > 8 else None
                )
            )
            for _ in range(2)
        ]
        async with asyncio.timeout(120):
            await killed.wait()
            os.kill((await cluster.live_ranks())[1], signal.SIGKILL)
            for result in await asyncio.gather(*streams):
                assert result == undisturbed
        assert not flooding.done(), "the flood was not one"
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
