"""A whole instance as `starfish up` starts it, attacked at its control ports: by a stranger, and by
a process that has the secret and says too much. And at Mooncake's ports, by another user."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import tarfile
import time
from pathlib import Path

import pytest

from cli.run_dir import read_state
from cli.up.model import shipped_model
from gpu_worker.engine.engine import STRANDED_S
from shared.api_key import new_api_key
from shared.confinement import listeners_of
from shared.etcd_store import connect_store
from shared.handshake import Access, Caller, introduce, rank_caller
from shared.keys import Keys
from shared.records import RankRecord, unpack_record
from shared.secret import read_secret
from shared.types import Epoch, Member, Role, Step
from shared.wire import Message, OpenRegion, StatusQuery, Wake, encode, read_message
from tests.support.cluster import Cluster, ports_in_a_row, running_cluster
from tests.support.metrics import metric_value

FORGED = Epoch(1 << 40)
NOBODY = 65534


async def records_of(cluster: Cluster) -> dict[int, RankRecord]:
    state = read_state(cluster.run_dir)
    assert state is not None
    store = await connect_store(state.target().store)
    try:
        values = (await store.get_prefix(Keys(state.instance).ranks)).values
    finally:
        await store.close()
    found = [unpack_record(value.value, RankRecord) for value in values]
    return {record.rank: record for record in found}


async def enter_and_send(
    record: RankRecord, caller: Caller, access: Access, messages: list[Message]
) -> list[Message]:
    """The answers, until the rank is silent or ends the connection."""
    reader, writer = await asyncio.open_connection(record.control_host, record.control_port)
    answers: list[Message] = []
    try:
        await introduce(caller, record, access, reader, writer)
        for message in messages:
            writer.write(encode(message))
        async with asyncio.timeout(1.0):
            while (answer := await read_message(reader)) is not None:
                answers.append(answer)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return answers


async def forge(record: RankRecord, data: bytes) -> bytes:
    """What the rank answers to bytes without a handshake."""
    reader, writer = await asyncio.open_connection(record.control_host, record.control_port)
    try:
        writer.write(data)
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


def wake_of(member: Member) -> Wake:
    return Wake(rank=member.rank, incarnation=member.incarnation, epoch=FORGED, step=Step(0))


def everything_readable(run_dir: Path) -> list[tuple[str, bytes]]:
    """Arguments and environment of every process here, and the logs and the state of the run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                found.append((str(entry / name), (entry / name).read_bytes()))
            except OSError:
                continue
    files = [*run_dir.glob("logs/*"), *run_dir.glob("*.json"), *run_dir.glob("*.log")]
    files += [run_dir / "etcd" / "etcd.log"]
    return found + [(str(path), path.read_bytes()) for path in files]


def secrets_of(run_dir: Path) -> list[bytes]:
    """The instance's secret, and every line of every private key: each is in a file of its own that
    only its user may read, in folders that only its user may enter."""
    paths = [run_dir / "secret", *run_dir.rglob("*.key"), *run_dir.rglob("*.password")]
    found: list[bytes] = []
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        found += [line for line in path.read_bytes().splitlines() if b"-----" not in line]
    for folder in {path.parent for path in paths}:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    assert len(paths) >= 8
    return [line for line in found if len(line) > 8]


async def expect_no_secret_shown(cluster: Cluster) -> None:
    shown = everything_readable(cluster.run_dir)
    shown.append(("status", json.dumps(await cluster.status()).encode()))
    for path in cluster.run_dir.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o077:
            shown.append((str(path), path.read_bytes()))
    secrets = secrets_of(cluster.run_dir)
    leaks = [where for where, text in shown for secret in secrets if secret in text]
    assert leaks == []


async def expect_no_secret_in_a_bundle(cluster: Cluster, folder: Path) -> None:
    """Logs, metrics, etcd's keys, processes and status are in it, and no secret is."""
    path = folder / "bundle.tar.gz"
    api_key = new_api_key()
    log = cluster.run_dir / "logs" / "agent.log"
    with log.open("ab") as file:  # as if a service had said too much
        file.write(secrets_of(cluster.run_dir)[0] + b"\n" + api_key.encode() + b"\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", "support-bundle"),
        *("--run-dir", str(cluster.run_dir), "--output", str(path)),
        env={**os.environ, "STARFISH_API_KEY": api_key},
    )
    assert await process.wait() == 0
    with tarfile.open(path) as tar:
        found = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    told = json.loads(found["bundle/contents.json"])
    assert told["missing"] == {}
    kinds = {name.partition("/")[0] for name in told["bytes"]}
    assert kinds >= {"logs", "metrics", "host", "etcd.json", "status.json", "processes.json"}
    assert json.loads(found["bundle/status.json"])["epoch"] > 0
    assert any(name.endswith("/spec") for name in json.loads(found["bundle/etcd.json"]))
    metrics = "".join(t.decode() for n, t in found.items() if n.startswith("bundle/metrics/"))
    assert metric_value(metrics, "starfish_control_plane_leader") == 1
    assert metric_value(metrics, "starfish_rank_up") == 2
    assert metric_value(metrics, "starfish_gateway_live_ranks") == 2
    secrets = [*secrets_of(cluster.run_dir), api_key.encode()]
    assert [n for n, text in found.items() for secret in secrets if secret in text] == []
    log.write_bytes(b"")  # for those who look at it next


async def expect_prompt(cluster: Cluster) -> None:
    """Sooner than a rank gives itself up that waits for a map which does not exist."""
    began = time.monotonic()
    result = await cluster.stream([5, 6, 7], max_tokens=4)
    assert len(result.token_ids) == 4, result.error
    assert time.monotonic() - began < STRANDED_S / 2


async def expect_other_users_kept_out(cluster: Cluster, control_ports: set[int]) -> None:
    """Of Mooncake's ports, whatever they say there, while streams go on."""
    members = await cluster.live_ranks()
    ports = {listener.port for pid in members.values() for listener in listeners_of(pid)}
    ports -= control_ports
    assert len(ports) >= 2 * len(members)
    expected = await cluster.stream([5, 6, 7], max_tokens=64)
    attack = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.data_port_attack", str(NOBODY)),
        *map(str, ports),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert attack.stdout is not None
    told = asyncio.ensure_future(attack.stdout.readline())
    try:
        while not told.done():
            assert await cluster.stream([5, 6, 7], max_tokens=64) == expected
        assert json.loads(await told) == {str(port): [] for port in ports}
        await expect_prompt(cluster)
        assert await cluster.live_ranks() == members
    finally:
        await attack.communicate(b"")  # closes its input


@pytest.mark.timeout(240)
async def test_an_instance_goes_on_whatever_is_said_to_its_control_ports(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    model = shipped_model()
    assert model is not None
    flags = ("--metrics-port", str(ports_in_a_row(3)))
    async with running_cluster(run_dir, model, ranks=2, flags=flags) as cluster:
        async with asyncio.timeout(60):
            while not (run_dir / "starfish.json").exists():  # noqa: ASYNC110 - a file tells nobody
                await asyncio.sleep(0.1)
        path = run_dir / "secret"
        secret = read_secret(path)
        await expect_no_secret_shown(cluster)
        await expect_no_secret_in_a_bundle(cluster, tmp_path)
        records = await records_of(cluster)
        members = await cluster.live_ranks()
        target, peer = records[0], records[1].member
        state = json.loads((run_dir / "starfish.json").read_text())
        ours = Access(state["instance"], secret)

        # Strangers: without a handshake, and with another secret.
        for data in (
            encode(wake_of(peer)),
            encode(OpenRegion(source=peer, transfer_name="t", generation=1 << 30)),
            (16 << 20).to_bytes(4, "big") + bytes(4096),
        ):
            assert await forge(target, data) == b""
        with pytest.raises(Exception, match="closed the connection"):
            await enter_and_send(
                target,
                Caller(role=Role.CLI, name="x"),
                Access(ours.instance, b"0" * 64),
                [StatusQuery(nonce=1)],
            )
        await expect_prompt(cluster)
        if os.geteuid() == 0:  # nobody else can act as another user
            await expect_other_users_kept_out(cluster, {r.control_port for r in records.values()})

        # With the secret, as a member: a map that nobody has published is not believed.
        for attacked, forger in ((records[0], records[1]), (records[1], records[0])):
            me = forger.member
            await enter_and_send(attacked, rank_caller(me), ours, [wake_of(me)])
        await asyncio.sleep(0.5)
        await expect_prompt(cluster)
        assert await cluster.live_ranks() == members, "a verdict has ended a healthy rank"
        assert (await records_of(cluster)).keys() == records.keys()
        assert {r.member for r in (await records_of(cluster)).values()} == {
            r.member for r in records.values()
        }
        await expect_no_secret_shown(cluster)
    assert not path.exists()
