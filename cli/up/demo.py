"""Shows one chat completion as its tokens stream, which proves that the instance serves."""

from __future__ import annotations

import json
from collections.abc import Mapping

import aiohttp
from rich.console import Console

from cli.up.readiness import own_gateway_session
from shared.clock import Clock
from shared.errors import Unavailable

PROMPT = "Tell me a story."
_MAX_TOKENS = 80
_TIMEOUT_S = 60.0


async def stream_demo(url: str, console: Console, clock: Clock, headers: Mapping[str, str]) -> str:
    """Returns a sentence about its speed. `headers` have an API key, if the gateway asks for one.
    Raises Unavailable if the answer does not end properly."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    console.print(f"[bold]>[/] {PROMPT}")
    started_at, first_at, chunks = clock.now(), 0.0, 0
    finish: str | None = None
    try:
        async with own_gateway_session(timeout, headers) as http:
            async with http.get(f"{url}/v1/models") as response:
                name = (await response.json())["data"][0]["id"]
            async with http.post(f"{url}/v1/chat/completions", json=_request(name)) as response:
                if response.status != 200:
                    raise Unavailable(f"the gateway answered {response.status}")
                async for line in response.content:
                    text, done = _delta(line)
                    finish = done or finish
                    if text is not None:
                        chunks += 1
                        first_at = first_at or clock.now()
                        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        raise Unavailable(f"the first completion failed: {error or 'no answer in time'}") from error
    console.print()
    if finish is None:
        raise Unavailable("the first completion ended early")
    first_ms, streaming_s = (first_at - started_at) * 1000, clock.now() - first_at
    rate = (chunks - 1) / streaming_s if chunks > 1 else 0.0
    return f"first token after {first_ms:.0f} ms, then {rate:.0f} tokens per second"


def _request(model: str) -> dict[str, object]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": _MAX_TOKENS,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "min_tokens": 16,
        "stream": True,
    }


def _delta(line: bytes) -> tuple[str | None, str | None]:
    """Text and finish reason of an SSE line. Replaces control characters, which a random model may
    write, because they could disturb the terminal."""
    if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
        return None, None
    event = json.loads(line[6:])
    if "error" in event:
        raise Unavailable(f"the first completion failed: {event['error'].get('message')}")
    if not event["choices"]:
        return None, None
    choice = event["choices"][0]
    text = choice["delta"].get("content")
    if text is not None:
        text = "".join(c if c.isprintable() or c == "\n" else "·" for c in text)
    return text, choice.get("finish_reason")
