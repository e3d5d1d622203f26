"""An HTTP port with and without TLS, on both kinds of event loops that services run on: who only
connects is in nobody's way, takes no more descriptors than the limit says, and leaves nothing."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop
from aiohttp import web

from shared.clock import SystemClock
from shared.connection_table import ConnectionLimits, Refusal
from shared.etcd_certificates import CertificateAuthority
from shared.http_listener import HttpListener
from shared.listener import listen_on
from shared.server_certificate import ServerCertificate, trusting

CONNECTIONS_MAX = 4
LATE_S = 30.0  # a loaded machine
REQUEST = b"GET /%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Loop = Callable[[], asyncio.AbstractEventLoop]


class Seen:
    def __init__(self) -> None:
        self.refused: list[Refusal] = []
        self.num_displaced = 0

    def on_connection_refused(self, refusal: Refusal) -> None:
        self.refused.append(refusal)

    def on_connection_displaced(self) -> None:
        self.num_displaced += 1

    def on_connection_timeout(self) -> None:
        raise AssertionError("nothing here waits so long")


class Port:
    """`/wait` answers when `go_on` is set."""

    def __init__(self, listener: HttpListener, seen: Seen, port: int, folder: Path | None) -> None:
        self.listener = listener
        self.seen = seen
        self.go_on = asyncio.Event()
        self.num_served = 0
        self._port = port
        self._believed = None if folder is None else trusting(folder / "ca.pem", flag="--ca")
        self._opened: list[Streams] = []

    async def show(self, request: web.Request) -> web.Response:
        self.num_served += 1
        if request.path == "/wait":
            await self.go_on.wait()
        return web.Response(text="x" * 300_000)

    async def connect(self, sent: bytes = b"") -> Streams:
        """Says nothing of TLS."""
        streams = await asyncio.open_connection("127.0.0.1", self._port)
        self._opened.append(streams)
        streams[1].write(sent)
        return streams

    async def ask(self, path: bytes = b"") -> bytes:
        """The whole answer; nothing if the connection ends without one."""
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1",
                self._port,
                ssl=self._believed,
                server_hostname="localhost" if self._believed else None,
            )
        except ConnectionError:
            return b""
        try:
            writer.write(REQUEST % path)
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    def close(self) -> None:
        for _, writer in self._opened:
            writer.close()


@asynccontextmanager
async def served(folder: Path | None) -> AsyncIterator[Port]:
    """With TLS, if there is a folder with certificates."""
    seen = Seen()
    limits = ConnectionLimits(
        connections_max=CONNECTIONS_MAX,
        per_address_max=CONNECTIONS_MAX,
        header_timeout_s=3600.0,
        idle_timeout_s=3600.0,
    )
    listener = HttpListener(
        limits, clock=SystemClock(), observer=seen, refusals=lambda which: which.value.encode()
    )
    opened = listen_on("127.0.0.1", 0)
    port = Port(listener, seen, opened.getsockname()[1], folder)
    app = web.Application(middlewares=[listener.track_request])
    app.add_routes([web.get("/{_:.*}", port.show)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    tls: ssl.SSLContext | None = None
    if folder is not None:
        tls = ServerCertificate(folder / "server.pem", folder / "server.key").context
    await listener.start(runner, [opened], tls, backlog=64)
    try:
        async with asyncio.timeout(4 * LATE_S):
            yield port
    finally:
        port.close()
        listener.stop()
        await runner.cleanup()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = CertificateAuthority.create(folder, SystemClock())
    authority.issue_server(("localhost", "127.0.0.1"))
    return folder


@pytest.fixture(params=["plain", "tls"])
def folder(request: pytest.FixtureRequest, certificates: Path) -> Path | None:
    return certificates if request.param == "tls" else None


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Loop:
    found: Loop = request.param
    return found


def run(loop: Loop, test: Awaitable[None]) -> None:
    async def body() -> None:
        await test

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(body())


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(LATE_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_all_who_ask_are_served_and_nothing_stays(loop: Loop, folder: Path | None) -> None:
    async def test() -> None:
        async with served(folder) as port:
            for _ in range(20):
                answers = await asyncio.gather(*(port.ask() for _ in range(CONNECTIONS_MAX)))
                assert [len(each) > 300_000 for each in answers] == [True] * CONNECTIONS_MAX
                await until(lambda: port.listener.num_connections == 0)
            assert (port.seen.num_displaced, port.seen.refused) == (0, [])

    run(loop, test())


def test_who_only_connects_is_in_nobodys_way(loop: Loop, folder: Path | None) -> None:
    """With TLS these never begin a handshake."""

    async def test() -> None:
        async with served(folder) as port:
            silent = [await port.connect() for _ in range(3 * CONNECTIONS_MAX)]
            await until(lambda: port.seen.num_displaced == 2 * CONNECTIONS_MAX)
            assert port.listener.num_connections == CONNECTIONS_MAX
            for reader, _ in silent[: 2 * CONNECTIONS_MAX]:
                with suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), LATE_S) == b""
            assert b" 200 OK" in await port.ask()
            assert port.seen.refused == []

    run(loop, test())


def test_who_is_served_stays_and_when_all_are_the_next_is_refused(
    loop: Loop, folder: Path | None
) -> None:
    async def test() -> None:
        async with served(folder) as port:
            asked = [asyncio.create_task(port.ask(b"wait")) for _ in range(CONNECTIONS_MAX - 1)]
            await until(lambda: port.num_served == CONNECTIONS_MAX - 1)
            for _ in range(3):
                await port.connect()
            asked.append(asyncio.create_task(port.ask(b"wait")))
            await until(lambda: port.num_served == CONNECTIONS_MAX)
            refused = await port.ask()
            assert refused == (Refusal.ADDRESS_FULL.value.encode() if folder is None else b"")
            assert port.seen.refused == [Refusal.ADDRESS_FULL]
            port.go_on.set()
            assert all(b" 200 OK" in answer for answer in await asyncio.gather(*asked))

    run(loop, test())


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 9000])
def test_nothing_stays_of_a_handshake_that_fails(
    loop: Loop, certificates: Path, sent: bytes
) -> None:
    async def test() -> None:
        async with served(certificates) as port:
            for _ in range(5):
                reader, writer = await port.connect(sent)
                writer.write_eof()
                with suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(), LATE_S)
            await until(lambda: port.listener.num_connections == 0)
            assert port.num_served == 0
            assert b" 200 OK" in await port.ask()

    run(loop, test())
