"""`stream_through_death.py URL PID`: undisturbed completions, then the same ones again with a
SIGKILL to PID in the middle, and answers by a schema with both; exits 0 if no token differs and
every answer keeps to the schema."""

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
GUIDED = 4  # more than one, so that several ranks have to follow the schema
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "is_sound": {"type": "boolean"}},
    "required": ["name", "is_sound"],
    "additionalProperties": False,
}


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


async def answer_by_schema(http: aiohttp.ClientSession, url: str, model: str, number: int) -> str:
    """What is wrong with it; empty: nothing."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"number {number}"}],
        "max_tokens": 128,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA},
        },
    }
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            return f"{response.status}: {await response.text()}"
        text = (await response.json())["choices"][0]["message"]["content"]
    try:
        answer = json.loads(text)
    except ValueError:
        return f"no JSON: {text!r}"
    is_right = (
        answer.keys() == {"name", "is_sound"}
        and answer["name"] in ("a", "b")
        and isinstance(answer["is_sound"], bool)
    )
    return "" if is_right else f"not what the schema allows: {text!r}"


async def streams_and_answers(
    http: aiohttp.ClientSession, url: str, model: str, killer: Killer | None
) -> tuple[list[list[int]], list[str]]:
    """The tokens of each stream, and what is wrong with answers."""
    streams = asyncio.gather(*(stream(http, url, model, n, killer) for n in range(NUM_STREAMS)))
    answers = asyncio.gather(*(answer_by_schema(http, url, model, n) for n in range(GUIDED)))
    return await streams, [wrong for wrong in await answers if wrong]


async def main(url: str, pid: int) -> int:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        async with http.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        oracle, bad_answers = await streams_and_answers(http, url, model, None)
        killer = Killer(pid)
        again, more_bad_answers = await streams_and_answers(http, url, model, killer)
    if not killer.done:
        print("the streams ended before the kill", file=sys.stderr)
        return 1
    if bad_answers or more_bad_answers:
        print("answers by a schema:", *bad_answers, *more_bad_answers, sep="\n", file=sys.stderr)
        return 1
    pairs = enumerate(zip(oracle, again, strict=True))
    wrong = [n for n, (was, now) in pairs if now != was or len(now) != NEW_TOKENS]
    if wrong:
        print(f"streams {wrong} differ from the undisturbed run", file=sys.stderr)
        return 1
    print(
        f"{NUM_STREAMS} streams of {NEW_TOKENS} tokens, none lost, none doubled; "
        f"{2 * GUIDED} answers by a schema"
    )
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], int(sys.argv[2]))))
