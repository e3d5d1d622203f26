"""The port of `/metrics` and `/health` of services: many who connect to it and say nothing take no
more descriptors than a few, and whoever scrapes it is answered."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge

from shared.errors import ConfigError
from shared.metrics_endpoint import metrics_handler, serve_routes

NUM_STRANGERS, CONNECTIONS_MAX = 200, 64
LATE_S = 60.0  # a loaded machine


async def nothing() -> None:
    pass


def routes() -> list[web.RouteDef]:
    registry = CollectorRegistry()
    Gauge("seen", "seen", registry=registry).set(7)
    return [web.get("/metrics", metrics_handler(registry, nothing))]


async def ended(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        await reader.read()


@pytest.mark.parametrize("sent", [b"", b"GET /met"])
async def test_who_connects_and_does_not_ask_takes_no_descriptors(sent: bytes) -> None:
    async with serve_routes(routes(), host="127.0.0.1", port=0, flags="--port") as port:
        strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(NUM_STRANGERS)]
        for _, writer in strangers:
            writer.write(sent)
        async with asyncio.timeout(LATE_S):
            for reader, _ in strangers[: NUM_STRANGERS - CONNECTIONS_MAX]:
                await ended(reader)
        async with aiohttp.ClientSession() as http:
            for _ in range(3):
                async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
                    assert "seen 7.0" in await response.text()
        for _, writer in strangers:
            writer.close()


async def test_a_port_that_is_taken_is_an_error_that_names_the_flag() -> None:
    async with serve_routes(routes(), host="127.0.0.1", port=0, flags="--port") as port:
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} .*--metrics-port"):
            async with serve_routes(
                routes(), host="127.0.0.1", port=port, flags="--metrics-port or --metrics-host"
            ):
                raise AssertionError("it listens twice")
