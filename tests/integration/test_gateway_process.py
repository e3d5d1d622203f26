"""`python -m gateway` as a process, with a real etcd: how it starts, what it says where it cannot,
and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from shared.codec import pack
from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.etcd_permissions import EtcdService
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys
from shared.records import GatewayRecord, unpack_record
from tests.support.authentication import client_session
from tests.support.cluster import free_port
from tests.support.etcd import flags_of
from tests.support.gateway_harness import GatewayHarness, toy_spec
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import ToyRank, toy_tokens

BODY = {"prompt": [3, 4], "max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
WAIT_S = 90.0

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def gateway(
    *flags: str, inherited_fds: Sequence[int] = ()
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", *flags),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=inherited_fds,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def fails_to_start(*flags: str) -> str:
    async with gateway(*flags) as process:
        async with asyncio.timeout(WAIT_S):
            _, said = await process.communicate()
        assert process.returncode == 1
        return said.decode()


@asynccontextmanager
async def harness_of(
    etcd: EmbeddedEtcd, keys: Keys, store: EtcdStore, *flags: str
) -> AsyncIterator[tuple[GatewayHarness, asyncio.subprocess.Process]]:
    port = free_port()
    options = (*flags_of(etcd, keys, EtcdService.GATEWAY), "--port", str(port), *flags)
    async with client_session() as http, gateway(*options) as process:
        harness = GatewayHarness(store, keys, http, port)
        try:
            yield harness, process
        finally:
            for rank in harness.ranks:
                await rank.kill()


async def health(harness: GatewayHarness, status: int, reason: str = "") -> None:
    """Until /health answers so."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                async with harness.http.get(harness.url + "/health") as response:
                    reasons = (await response.json())["reasons"]
                    if response.status == status and any(reason in r for r in reasons or [""]):
                        return
            except aiohttp.ClientConnectorError:
                pass
            await asyncio.sleep(0.02)


async def ready_status(url: str) -> int:
    """Over a connection of its own."""
    async with client_session() as http, http.get(url + "/health/ready") as response:
        return response.status


async def complete(harness: GatewayHarness) -> list[int]:
    async with harness.http.post(harness.url + "/v1/completions", json=BODY) as response:
        assert response.status == 200, await response.text()
        ids: list[int] = (await response.json())["choices"][0]["token_ids"]
        return ids


async def test_it_waits_for_the_spec_then_serves_and_outlives_etcd(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    keys = Keys("i")
    async with embedded_etcd(tmp_path / "etcd") as etcd:
        await etcd.admit(keys)
        store = await connect_store(etcd.root)
        async with harness_of(etcd, keys, store) as (harness, _):
            await health(harness, 503, "no spec yet")
            await store.put(keys.spec, pack(toy_spec(tmp_path, num_ranks=1)))
            await health(harness, 503, "no expert map")
            await harness.publish([await harness.add_rank(ToyRank(0))])
            await health(harness, 200)
            assert await complete(harness) == toy_tokens([3, 4], 20)
            await etcd.kill()
            assert await complete(harness) == toy_tokens([3, 4], 20)
            await etcd.start()
            replacement = await harness.add_rank(ToyRank(1))
            await harness.publish([replacement])
            await harness.wait_metric("epoch", 2)
            assert await complete(harness) == toy_tokens([3, 4], 20)
            assert len(replacement.submits) == 1
        await store.close()


async def test_requests_wait_while_a_killed_gateway_is_replaced(
    etcd: EmbeddedEtcd, keys: Keys, store: EtcdStore, tmp_path: Path
) -> None:
    """None is refused: not by the port, and not by a gateway that has not read etcd yet."""
    write_tokenizer(tmp_path)
    await store.put(keys.spec, pack(toy_spec(tmp_path, num_ranks=1)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        flags = (*flags_of(etcd, keys, EtcdService.GATEWAY), "--listen-fd", str(fd))
        async with client_session() as http:
            harness = GatewayHarness(store, keys, http, listener.getsockname()[1])
            await harness.publish([await harness.add_rank(ToyRank(0))])
            async with gateway(*flags, inherited_fds=[fd]) as killed:
                await health(harness, 200)
                killed.kill()
                await killed.wait()
                waiting = [asyncio.create_task(complete(harness)) for _ in range(20)]
                await asyncio.sleep(0.2)
                async with gateway(*flags, inherited_fds=[fd]), asyncio.timeout(WAIT_S):
                    assert await asyncio.gather(*waiting) == [toy_tokens([3, 4], 20)] * 20
            await harness.ranks[0].kill()


async def test_gateways_share_a_port_if_all_say_so_and_have_one_each(
    etcd: EmbeddedEtcd, keys: Keys, store: EtcdStore, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    await store.put(keys.spec, pack(toy_spec(tmp_path, num_ranks=1)))
    sharing = ("--reuse-port", "--own-port", "0", "--routing", "power-of-two")
    async with harness_of(etcd, keys, store, *sharing) as (harness, first):
        port = int(harness.url.rpartition(":")[2])
        reach = (*flags_of(etcd, keys, EtcdService.GATEWAY), "--port", str(port))
        await harness.publish([await harness.add_rank(ToyRank(0))])
        await health(harness, 200)
        assert "cannot listen on" in await fails_to_start(*reach)
        async with gateway(*reach, *sharing) as second:
            async with asyncio.timeout(WAIT_S):
                while len(records := (await store.get_prefix(keys.gateways)).values) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            found = [unpack_record(each.value, GatewayRecord) for each in records]
            assert {record.port for record in found} == {port}
            assert {record.pid for record in found} == {first.pid, second.pid}
            for record in found:
                own = GatewayHarness(store, keys, harness.http, record.own_port)
                await health(own, 200)
                assert await complete(own) == toy_tokens([3, 4], 20)


async def test_one_of_those_that_share_a_port_accepts_no_more_once_it_is_told_to_end(
    etcd: EmbeddedEtcd, keys: Keys, store: EtcdStore, tmp_path: Path
) -> None:
    """The other one does: nobody gets a 503 as long as it lives."""
    write_tokenizer(tmp_path)
    await store.put(keys.spec, pack(toy_spec(tmp_path, num_ranks=1)))
    async with harness_of(etcd, keys, store, "--reuse-port") as (harness, first):
        port = int(harness.url.rpartition(":")[2])
        reach = (*flags_of(etcd, keys, EtcdService.GATEWAY), "--port", str(port), "--reuse-port")
        rank = await harness.add_rank(ToyRank(0))
        rank.hold_at = 3
        await harness.publish([rank])
        await health(harness, 200)
        held = asyncio.create_task(complete(harness))
        await asyncio.wait_for(rank.submitted.wait(), WAIT_S)
        async with gateway(*reach) as second:
            async with asyncio.timeout(WAIT_S):
                while len((await store.get_prefix(keys.gateways)).values) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            first.send_signal(signal.SIGTERM)
            async with asyncio.timeout(WAIT_S):
                assert first.stderr is not None
                while b"gateway_draining" not in await first.stderr.readline():
                    pass
            rank.hold_at = None
            async with asyncio.timeout(WAIT_S):  # the other one may still read etcd
                while await ready_status(harness.url) != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            for _ in range(30):
                assert await ready_status(harness.url) == 200
            rank.go()
            assert await held == toy_tokens([3, 4], 20)
            async with asyncio.timeout(WAIT_S):
                await first.communicate()
            # The last one of a port has nobody to leave it to.
            rank.hold_at = 3
            rank.submitted.clear()
            held = asyncio.create_task(complete(harness))
            await asyncio.wait_for(rank.submitted.wait(), WAIT_S)
            second.send_signal(signal.SIGTERM)
            await health(harness, 503, "shutting down")
            rank.go()
            await held


async def test_a_descriptor_that_is_no_listening_socket() -> None:
    said = await fails_to_start("--listen-fd", "0")
    assert "no listening socket" in said


async def test_sigterm_lets_a_stream_end_and_leaves_nothing_in_etcd(
    etcd: EmbeddedEtcd, keys: Keys, store: EtcdStore, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    async with harness_of(etcd, keys, store) as (harness, process):
        await store.put(keys.spec, pack(toy_spec(tmp_path, num_ranks=1)))
        rank = await harness.add_rank(ToyRank(0))
        rank.hold_at = 3
        await harness.publish([rank])
        await health(harness, 200)
        async with asyncio.timeout(20):
            while not (await store.get_prefix(keys.gateways)).values:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        running = asyncio.create_task(complete(harness))
        await asyncio.wait_for(rank.submitted.wait(), WAIT_S)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            assert process.stderr is not None
            while b"gateway_draining" not in await process.stderr.readline():
                pass
        rank.go()
        assert await running == toy_tokens([3, 4], 20)
        async with asyncio.timeout(WAIT_S):
            await process.communicate()
        assert process.returncode == 0
        assert not (await store.get_prefix(keys.gateways)).values


async def test_a_stream_that_outlasts_the_drain_ends_with_an_error(
    etcd: EmbeddedEtcd, keys: Keys, store: EtcdStore, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    async with harness_of(etcd, keys, store, "--drain-s", "0.1") as (harness, process):
        await store.put(keys.spec, pack(toy_spec(tmp_path, num_ranks=1)))
        rank = await harness.add_rank(ToyRank(0))
        rank.hold_at = 3
        await harness.publish([rank])
        await health(harness, 200)
        body = {**BODY, "stream": True}
        async with harness.http.post(harness.url + "/v1/completions", json=body) as response:
            process.send_signal(signal.SIGTERM)
            text = await response.text()
        assert "shutting_down" in text
        async with asyncio.timeout(WAIT_S):
            assert (await process.communicate(), process.returncode)[1] == 0


async def test_the_end_of_its_lifeline_ends_it(etcd: EmbeddedEtcd, keys: Keys) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", *flags_of(etcd, keys, EtcdService.GATEWAY)),
        *("--port", "0", "--lifeline-fd", str(read_end)),
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=(read_end,),
    )
    os.close(read_end)
    os.close(write_end)
    async with asyncio.timeout(WAIT_S):
        assert await process.wait() == 0


async def test_a_taken_port_is_said_in_one_sentence(etcd: EmbeddedEtcd, keys: Keys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = await fails_to_start(*flags_of(etcd, keys, EtcdService.GATEWAY), "--port", port)
    assert len(said.strip().splitlines()) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in said


async def test_an_etcd_that_is_not_there_is_said_in_one_sentence() -> None:
    said = await fails_to_start("--etcd", f"127.0.0.1:{free_port()}", "--port", "0")
    assert len(said.strip().splitlines()) == 1
    assert "no etcd answers" in said


async def test_a_broken_checkpoint_is_said_in_one_sentence_without_a_traceback(
    etcd: EmbeddedEtcd, keys: Keys, store: EtcdStore, tmp_path: Path
) -> None:
    await store.put(keys.spec, pack(toy_spec(tmp_path)))
    said = await fails_to_start(*flags_of(etcd, keys, EtcdService.GATEWAY), "--port", "0")
    assert "cannot read" in said.strip().splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_the_gateway_never_imports(module: str) -> None:
    code = f"import gateway.__main__, sys; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=90).returncode == 0
