"""One real etcd per test session, and a namespace of its own for every test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from shared.embedded_etcd import embedded_etcd
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The endpoint of an etcd that all tests share: use `keys` of your own in it."""
    async with embedded_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server.endpoint


@pytest.fixture
def keys() -> Keys:
    """Keys of an instance that no other test uses."""
    return Keys(uuid.uuid4().hex[:12])


@pytest_asyncio.fixture
async def store(etcd: str) -> AsyncIterator[EtcdStore]:
    connected = await connect_store([etcd])
    yield connected
    await connected.close()
