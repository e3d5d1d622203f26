"""One real etcd per test session, and a namespace of its own for every test. All authentication is
on if STARFISH_TEST_AUTHENTICATED is set."""

from __future__ import annotations

import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.embedded_etcd import EmbeddedEtcd, embedded_etcd
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys
from tests.support.authentication import switch_on_if_wanted


def pytest_configure(config: pytest.Config) -> None:
    config.add_cleanup(switch_on_if_wanted())


LONG_FILES = (
    "test_releases.py",
    "test_two_nodes_changed.py",
    "test_chaos.py",
    "test_planned_changes.py",
    "test_soak.py",
    "test_cli_eval.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that no process is left alone with one of them."""
    num_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG_FILES, -num_tests[item.path]))


@pytest.fixture(autouse=True)
def commands_hear_ctrl_c() -> Iterator[None]:
    """Whatever runs the tests may ignore SIGINT, and what it starts would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedEtcd]:
    async with embedded_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers with eight experts."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    create_seeded_checkpoint(
        folder,
        num_hidden_layers=2,
        hidden_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    return folder


@pytest.fixture
def keys() -> Keys:
    """Keys of an instance that no other test uses."""
    return Keys(uuid.uuid4().hex[:12])


@pytest_asyncio.fixture
async def etcd(shared_etcd: EmbeddedEtcd, keys: Keys) -> EmbeddedEtcd:
    """An etcd that all tests share, with the users of the instance `keys`."""
    await shared_etcd.admit(keys)
    return shared_etcd


@pytest_asyncio.fixture
async def store(shared_etcd: EmbeddedEtcd) -> AsyncIterator[EtcdStore]:
    """As a user that may do everything."""
    connected = await connect_store(shared_etcd.root)
    yield connected
    await connected.close()
