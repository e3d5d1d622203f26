"""Streams as they are on the connection: whatever the pace and the HTTP version of the client, each
event comes whole, once and in order."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tests.support.authentication import api_key
from tests.support.gateway_harness import GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import toy_tokens

PROMPT = [5, 6, 7]
TOKENS = 500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(model: Path) -> str:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return str(tokenizer.decode(toy_tokens(PROMPT, TOKENS)))


@pytest_asyncio.fixture
async def harness(model: Path) -> AsyncIterator[GatewayHarness]:
    async with running_gateway(model) as running:
        yield running


async def open_stream(
    harness: GatewayHarness, path: str, body: dict[str, Any], *, version: str, window: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that has read nothing yet, and whose host keeps `window` bytes for it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.setblocking(False)
    port = int(harness.url.rpartition(":")[2])
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
    head += f"x-api-key: {api_key()}\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return reader, writer


def events_of(answer: bytes) -> list[dict[str, Any]]:
    """Those of the body, which must be framed as its header says and end with [DONE]."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    if b"transfer-encoding: chunked" in head.lower():
        body = _unframed(body)
    *events, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    lines = [line for event in events for line in event.splitlines() if line.startswith(b"data: ")]
    return [json.loads(line[6:]) for line in lines]


def _unframed(body: bytes) -> bytes:
    pieces = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            assert body == b"\r\n"
            return pieces
        pieces += body[: int(size, 16)]
        assert body[int(size, 16) :][:2] == b"\r\n"
        body = body[int(size, 16) + 2 :]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("window", [2048, 1 << 20])
async def test_a_client_may_be_slow(
    harness: GatewayHarness, text: str, version: str, window: int
) -> None:
    """Each event of this API has the whole text so far, which no connection holds."""
    parameters = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": parameters, "stream": True}
    reader, writer = await open_stream(harness, "/generate", body, version=version, window=window)
    async with asyncio.timeout(120):
        while True:
            running = any(rank.load().running for rank in harness.ranks)
            if any(rank.submits for rank in harness.ranks) and not running:
                break
            await asyncio.sleep(0.01)
        answer = await reader.read(-1)
    writer.close()
    events = events_of(answer)
    ends = [event["meta_info"]["completion_tokens"] for event in events]
    assert ends == sorted(set(ends))
    assert ends[-1] == TOKENS
    assert events[-1]["text"] == text
    assert all(text.startswith(event["text"].rstrip("\ufffd")) for event in events)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("choices", [1, 3])
async def test_the_chunks_of_a_choice_are_its_text(
    harness: GatewayHarness, text: str, version: str, choices: int
) -> None:
    options = {"max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
    body = {"prompt": [PROMPT] * choices, "return_token_ids": True, **options}
    reader, writer = await open_stream(
        harness, "/v1/completions", body, version=version, window=1 << 16
    )
    async with asyncio.timeout(60):
        answer = await reader.read(-1)
    writer.close()
    for number in range(choices):
        chunks = [c for event in events_of(answer) for c in event["choices"]]
        own = [chunk for chunk in chunks if chunk["index"] == number]
        assert [token for chunk in own for token in chunk["token_ids"]] == toy_tokens(PROMPT, 300)
        joined = "".join(chunk["text"] for chunk in own)
        assert text.startswith(joined.rstrip("\ufffd"))
        assert own[-1]["finish_reason"] == "length"


async def test_a_client_that_stops_reading_is_dropped(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is larger than all that the kernel keeps for it."""
    monkeypatch.setattr("gateway.api.stream_body.WRITE_TIMEOUT_S", 0.3)
    parameters = {"max_new_tokens": 4000, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": parameters, "stream": True}
    async with running_gateway(model, context_tokens_max=4096) as harness:
        connections = await harness.metric("connections")
        _, writer = await open_stream(harness, "/generate", body, version="1.1", window=2048)
        await harness.wait_metric("sessions_in_flight", 1)
        assert await harness.metric("connections") == connections + 1
        await harness.wait_metric("connections", connections)
        assert await harness.metric("sessions_in_flight") == 0
        assert any(rank.cancels for rank in harness.ranks)
        writer.close()
