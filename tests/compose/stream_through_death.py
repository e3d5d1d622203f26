"""`stream_through_death.py URL PID`: an undisturbed completion, then the same ones again with a
SIGKILL to PID in the middle; exits 0 if no token differs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import aiohttp

NUM_STREAMS = 8
NEW_TOKENS = 96
KILL_AT_TOKENS = 200


class Killer:
    """Kills once, when all streams together have received so many tokens."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen = 0
        self.done = False

    def __call__(self) -> None:
        self._seen += 1
        if self._seen >= KILL_AT_TOKENS and not self.done:
            self.done = True
            os.kill(self._pid, signal.SIGKILL)
            print(f"killed pid {self._pid} after {self._seen} tokens", flush=True)


async def stream(
    http: aiohttp.ClientSession, url: str, model: str, number: int, killer: Killer | None
) -> list[int]:
    body = {
        "model": model,
        "prompt": [300 + number * 7 + i for i in range(16)],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    ids: list[int] = []
    async with http.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                fresh = choice.get("token_ids") or []
                ids += fresh
                if killer is not None:
                    for _ in fresh:
                        killer()
    return ids


async def main(url: str, pid: int) -> int:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        async with http.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        numbers = range(NUM_STREAMS)
        oracle = await asyncio.gather(*(stream(http, url, model, n, None) for n in numbers))
        killer = Killer(pid)
        again = await asyncio.gather(*(stream(http, url, model, n, killer) for n in numbers))
    if not killer.done:
        print("the streams ended before the kill", file=sys.stderr)
        return 1
    wrong = [n for n in numbers if again[n] != oracle[n] or len(again[n]) != NEW_TOKENS]
    if wrong:
        print(f"streams {wrong} differ from the undisturbed run", file=sys.stderr)
        return 1
    print(f"{NUM_STREAMS} streams of {NEW_TOKENS} tokens, none lost, none doubled")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], int(sys.argv[2]))))
