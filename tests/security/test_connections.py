"""Clients that connect and do not ask: half a header, no byte at all, an idle connection, too many
of them. The gateway is a process of its own, and its other clients are served meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import re
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from shared.clock import SystemClock
from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.etcd_certificates import CertificateAuthority
from shared.etcd_permissions import EtcdService
from shared.keys import Keys
from shared.server_certificate import trusting
from tests.support.cluster import free_port
from tests.support.etcd import flags_of

KEYS = Keys("default")

DISPLACED = 'connections_refused_total{reason="displaced"}'
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Drop: "
WHOLE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
HEADER_TIMEOUT_S, IDLE_TIMEOUT_S = 1.0, 2.5
LATE_S = 10.0  # a loaded machine
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Gateway:
    """All its connections close with it."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.port = port
        self._tls = tls
        self.opened: list[Streams] = []

    async def connect(
        self, first: bytes = b"", *, source: str = "127.0.0.1", is_secured: bool = True
    ) -> Streams:
        tls = self._tls if is_secured else None
        streams = await asyncio.open_connection(
            "127.0.0.1", self.port, local_addr=(source, 0), ssl=tls
        )
        self.opened.append(streams)
        streams[1].write(first)
        return streams

    async def is_live(self, *, source: str = "127.0.0.1") -> bool:
        try:
            streams = await self.connect(WHOLE, source=source)
            return b" 200 " in await asyncio.wait_for(streams[0].readline(), LATE_S)
        except ConnectionError:
            return False

    async def metric(self, name: str) -> float:
        reader, _ = await self.connect(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await asyncio.wait_for(reader.read(), LATE_S)).decode()
        found = re.search(rf"^starfish_gateway_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@asynccontextmanager
async def running(
    etcd: EmbeddedEtcd, *flags: str, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Gateway]:
    gateway = Gateway(free_port(), tls)
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "gateway",
            *flags_of(etcd, KEYS, EtcdService.GATEWAY),
            "--port",
            str(gateway.port),
        ),
        *("--header-timeout-s", str(HEADER_TIMEOUT_S), "--idle-timeout-s", str(IDLE_TIMEOUT_S)),
        *flags,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(60):
            while not await gateway.is_live():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        yield gateway
    finally:
        for _, writer in gateway.opened:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        process.terminate()
        await process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedEtcd]:
    async with embedded_etcd(tmp_path_factory.mktemp("etcd")) as server:
        await server.admit(KEYS)
        yield server


async def end_of(streams: Streams) -> float:
    """Seconds until the gateway closes the connection."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    with suppress(ConnectionError):
        await asyncio.wait_for(streams[0].read(), 60)
    return loop.time() - began


async def until_ended(connections: list[Streams], number: int) -> None:
    """Any of them."""
    ends = [asyncio.create_task(end_of(each)) for each in connections]
    for end in itertools.islice(asyncio.as_completed(ends), number):
        await end
    for end in ends:
        end.cancel()
    await asyncio.gather(*ends, return_exceptions=True)


async def test_half_headers_and_silence_end_and_others_are_served(etcd: EmbeddedEtcd) -> None:
    async with running(etcd) as gateway:
        hostile = [await gateway.connect(HALF) for _ in range(20)]
        hostile += [await gateway.connect() for _ in range(20)]
        assert await gateway.is_live()
        ends = await asyncio.gather(*map(end_of, hostile))
        assert max(ends) < HEADER_TIMEOUT_S + LATE_S
        assert await gateway.is_live()
        assert await gateway.metric("connection_timeouts_total") >= 40


async def test_a_header_in_drops_gets_no_more_time(etcd: EmbeddedEtcd) -> None:
    async with running(etcd) as gateway:
        reader, writer = await gateway.connect(HALF)
        with suppress(ConnectionError):
            async with asyncio.timeout(HEADER_TIMEOUT_S + LATE_S):
                while not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)


async def test_an_idle_connection_ends_and_a_header_in_drops_after_an_answer_too(
    etcd: EmbeddedEtcd,
) -> None:
    long_s = 8.0
    async with running(etcd, "--idle-timeout-s", str(long_s)) as gateway:
        idle, drops = await gateway.connect(WHOLE), await gateway.connect(WHOLE)
        for reader, _ in (idle, drops):
            assert b" 200 " in await reader.readline()
        drops[1].write(HALF)
        idle_s, drops_s = await asyncio.gather(end_of(idle), end_of(drops))
        assert HEADER_TIMEOUT_S + 0.2 < idle_s < long_s + LATE_S
        assert drops_s < long_s


async def test_a_connection_that_goes_on_asking_is_kept(etcd: EmbeddedEtcd) -> None:
    """For longer than an idle one and than a header may take; the pauses are far shorter than the
    former, and longer than the latter."""
    async with running(etcd, "--idle-timeout-s", "5") as gateway:
        reader, writer = await gateway.connect()
        for _ in range(5):
            writer.write(WHOLE)
            assert b" 200 " in await reader.readline()
            while (await reader.readline()).strip():
                pass
            await reader.readexactly(len(b'{"status": "live"}'))
            await asyncio.sleep(HEADER_TIMEOUT_S * 1.3)


async def test_one_address_leaves_room_for_others_and_keeps_its_own_users_in(
    etcd: EmbeddedEtcd,
) -> None:
    """As behind a proxy, whose address all have."""
    flags = ("--connections-per-address-max", "5", "--header-timeout-s", "600")
    async with running(etcd, *flags) as gateway:
        hostile = [await gateway.connect(HALF, source="127.0.0.2") for _ in range(10)]
        await until_ended(hostile, 5)
        assert await gateway.is_live()
        assert await gateway.is_live(source="127.0.0.2")
        assert await gateway.metric(DISPLACED) >= 6
        assert await gateway.metric('connections_refused_total{reason="address_full"}') == 0


@pytest.mark.parametrize("first", [b"", HALF, WHOLE])
async def test_strangers_from_many_addresses_keep_nobody_out(
    etcd: EmbeddedEtcd, first: bytes
) -> None:
    """They say nothing, or half a header, or stay after an answer that needs no key."""
    flags = ("--connections-max", "8", "--idle-timeout-s", "600", "--header-timeout-s", "600")
    async with running(etcd, *flags) as gateway:
        hostile = [await gateway.connect(first, source=f"127.0.0.{2 + i}") for i in range(24)]
        await until_ended(hostile, 16)
        assert await gateway.is_live(source="127.0.0.99")
        assert await gateway.metric("connections") <= 8
        assert await gateway.metric(DISPLACED) > 0


async def test_handshakes_of_tls_that_do_not_end_are_connections_too(
    etcd: EmbeddedEtcd, tmp_path: Path
) -> None:
    """Else they would take all descriptors, from files and ranks as well."""
    authority = CertificateAuthority.create(tmp_path, SystemClock())
    certificate, key = authority.issue_server(("127.0.0.1",))
    believed = trusting(authority.ca_path, flag="--ca")
    flags = ("--connections-max", "8", "--tls-cert", str(certificate), "--tls-key", str(key))
    async with running(etcd, *flags, "--header-timeout-s", "600", tls=believed) as gateway:
        for part in (b"", b"\x16\x03\x01\x02\x00\x01", HALF):
            hostile = [await gateway.connect(part, is_secured=False) for _ in range(24)]
            await until_ended(hostile, 16)
            assert await gateway.is_live()
        assert await gateway.metric("connections") <= 8
        assert await gateway.metric(DISPLACED) > 0


async def test_more_connections_than_descriptors_do_not_stop_it(
    etcd: EmbeddedEtcd, tmp_path: Path
) -> None:
    """With a limit of 300 descriptors and connections_max beyond it, a stranger holds many."""
    script = tmp_path / "limited.sh"
    script.write_text(f'ulimit -n 300\nexec {sys.executable} -m gateway "$@"\n')
    gateway = Gateway(free_port())
    process = await asyncio.create_subprocess_exec(
        *(
            "bash",
            str(script),
            *flags_of(etcd, KEYS, EtcdService.GATEWAY),
            "--port",
            str(gateway.port),
        ),
        *("--header-timeout-s", str(HEADER_TIMEOUT_S)),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            while b"connections_limited" not in await process.stderr.readline():
                assert process.returncode is None
            while not await gateway.is_live():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        hostile = [await gateway.connect(HALF) for _ in range(400)]
        await asyncio.gather(*map(end_of, hostile))
        assert await gateway.is_live()
    finally:
        for _, writer in gateway.opened:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        process.terminate()
        await process.communicate()
