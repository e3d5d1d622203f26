"""`starfish up` as a user meets it: what is impossible is one sentence, and nothing is ever left
behind, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cli.observe.instance_view import InstanceView
from cli.observe.read_view import read_view
from cli.run_dir import read_state
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from shared.embedded_etcd import EmbeddedEtcd
from shared.errors import StoreUnavailable
from shared.etcd_store import EtcdStore, connect_store
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import LeaderRecord, unpack_map, unpack_record
from shared.types import RankId
from tests.support.authentication import client_session
from tests.support.cluster import free_port

pytestmark = pytest.mark.timeout(240)
WAIT_S = 120.0
ROOT = Path(__file__).parents[2]
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
Process = asyncio.subprocess.Process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    create_seeded_checkpoint(folder, moe_intermediate_size=32, **SMALL)
    return folder


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


async def starfish(*arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def up(run_dir: Path, port: int, *flags: str) -> Process:
    return await starfish(
        *("up", "--no-demo", "--ranks", "2", "--run-dir", str(run_dir), "--port", str(port)),
        *("--instance", run_dir.name, *flags),
    )


async def started(process: Process, run_dir: Path) -> None:
    async with asyncio.timeout(WAIT_S):
        while read_state(run_dir) is None:
            if process.returncode is not None:
                _, err = await process.communicate()
                raise AssertionError(err.decode())
            await asyncio.sleep(0.1)


def command_lines() -> Iterator[str]:
    """Of all processes, each after its pid."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        yield f"{entry.name} {command}"


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of all that belongs to the instance, by its unique name or folder."""
    return [line for line in command_lines() if run_dir.name in line and "-m pytest" not in line]


async def gone(run_dir: Path) -> None:
    try:
        async with asyncio.timeout(60):
            while processes_of(run_dir):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(processes_of(run_dir)) from None


@pytest.fixture
def run_dir(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tmp_path / f"up-{abs(hash(request.node.nodeid)) % 10**9}"


async def fails(run_dir: Path, port: int, *flags: str) -> str:
    """The one sentence that it says."""
    process = await up(run_dir, port, *flags)
    async with asyncio.timeout(WAIT_S):
        out, err = await process.communicate()
    assert process.returncode == 1, (out, err)
    assert b"Traceback" not in out + err
    await gone(run_dir)
    lines = err.decode().strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("starfish: ")
    return lines[0]


def damaged(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "damaged"))


async def test_a_port_in_use(run_dir: Path, model: Path, taken_port: int) -> None:
    sentence = await fails(run_dir, taken_port, "--model", str(model))
    assert str(taken_port) in sentence


async def test_a_missing_folder(run_dir: Path) -> None:
    assert "/nowhere" in await fails(run_dir, free_port(), "--model", "/nowhere")


async def test_a_missing_shard(run_dir: Path, model: Path, tmp_path: Path) -> None:
    folder = damaged(model, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    assert shard.name in await fails(run_dir, free_port(), "--model", str(folder))


async def test_a_truncated_shard(run_dir: Path, model: Path, tmp_path: Path) -> None:
    folder = damaged(model, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 100)
    assert shard.name in await fails(run_dir, free_port(), "--model", str(folder))


async def test_an_unknown_architecture(run_dir: Path, model: Path, tmp_path: Path) -> None:
    folder = damaged(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Llama"]}))
    assert "Llama" in await fails(run_dir, free_port(), "--model", str(folder))


async def test_etcd_out_of_reach(run_dir: Path, model: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    sentence = await fails(run_dir, free_port(), "--model", str(model), "--etcd", endpoint)
    assert endpoint in sentence


async def test_too_few_slots(run_dir: Path, model: Path) -> None:
    flags = ("--model", str(model), "--slots-per-rank", "3")
    assert "slots" in await fails(run_dir, free_port(), *flags)


async def test_an_alias_that_means_something_else(run_dir: Path, model: Path) -> None:
    flags = ("--model", str(model), "--moe-a2a-backend", "deepep")
    assert "--moe-a2a-backend" in await fails(run_dir, free_port(), *flags)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_a_stop_leaves_nothing(run_dir: Path, model: Path, how: signal.Signals) -> None:
    process = await up(run_dir, free_port(), "--model", str(model))
    await started(process, run_dir)
    process.send_signal(how)
    async with asyncio.timeout(WAIT_S):
        out, err = await process.communicate()
    assert process.returncode == 0, (out, err)
    await gone(run_dir)
    assert list(run_dir.iterdir()) == []


async def test_a_killed_up_takes_all_with_it(run_dir: Path, model: Path) -> None:
    process = await up(run_dir, free_port(), "--model", str(model))
    await started(process, run_dir)
    assert len(processes_of(run_dir)) >= 6
    process.kill()
    await process.wait()
    await gone(run_dir)
    assert [path.name for path in run_dir.iterdir()] == ["logs"]


async def test_an_up_that_is_killed_while_etcd_starts_takes_etcd_with_it(
    run_dir: Path, model: Path
) -> None:
    process = await up(run_dir, free_port(), "--model", str(model))

    def is_watched() -> bool:
        """Whether there is the process that will end etcd."""
        etcd = [line.split()[0] for line in processes_of(run_dir) if "--data-dir" in line]
        watchdogs = [line.split() for line in command_lines() if "cleanup_watchdog" in line]
        return bool(etcd) and any(words[-1] == etcd[0] for words in watchdogs)

    async with asyncio.timeout(WAIT_S):
        while not is_watched():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    process.kill()
    await process.wait()
    await gone(run_dir)


async def test_a_second_interrupt_ends_even_a_stopped_rank(run_dir: Path, model: Path) -> None:
    process = await up(run_dir, free_port(), "--model", str(model))
    await started(process, run_dir)
    stopping = await starfish("kill", "1", "--signal", "STOP", "--run-dir", str(run_dir))
    assert await stopping.wait() == 0
    process.send_signal(signal.SIGINT)
    await asyncio.sleep(0.2)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(WAIT_S):
        await process.communicate()
    await gone(run_dir)
    assert list(run_dir.iterdir()) == []


def pids_of(run_dir: Path, module: str) -> list[int]:
    return [int(p.split()[0]) for p in processes_of(run_dir) if f"-m {module} " in p]


async def test_the_standby_takes_over_from_a_killed_gateway(run_dir: Path, model: Path) -> None:
    port = free_port()
    process = await up(run_dir, port, "--model", str(model))
    await started(process, run_dir)
    (gateway,) = pids_of(run_dir, "gateway")
    async with asyncio.timeout(WAIT_S):
        while not (standby := pids_of(run_dir, "gateway.standby")):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    os.kill(gateway, signal.SIGKILL)

    async def serves() -> bool:
        try:
            async with http.get(f"http://127.0.0.1:{port}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async with client_session() as http, asyncio.timeout(WAIT_S):
        while not await serves():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert pids_of(run_dir, "gateway") == standby
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 0
    await gone(run_dir)


async def gateways_of(run_dir: Path) -> list[dict[str, Any]]:
    process = await starfish("status", "--json", "--run-dir", str(run_dir))
    out, _ = await process.communicate()
    found: list[dict[str, Any]] = json.loads(out)["gateways"]
    return found


async def sessions_in_flight(http: aiohttp.ClientSession, own_port: int) -> int:
    async with http.get(f"http://127.0.0.1:{own_port}/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith("starfish_gateway_sessions_in_flight "):
                return int(float(line.split()[1]))
    raise AssertionError("no such metric")


async def test_a_killed_gateway_takes_only_its_own_streams_with_it(
    run_dir: Path, model: Path
) -> None:
    port, num_streams, num_tokens = free_port(), 16, 600
    url = f"http://127.0.0.1:{port}/v1/completions"
    body = {"prompt": [3, 4], "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    begun = asyncio.Semaphore(0)

    async def stream() -> bool:
        """Whether it came to its end."""
        async with client_session() as http, http.post(url, json=body) as response:
            await response.content.readany()
            begun.release()
            with contextlib.suppress(aiohttp.ClientPayloadError):
                return (await response.read()).endswith(b"data: [DONE]\n\n")
        return False

    process = await up(run_dir, port, "--model", str(model), "--gateways", "2")
    await started(process, run_dir)
    async with asyncio.timeout(WAIT_S):
        while not pids_of(run_dir, "gateway.standby"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        gateways = await gateways_of(run_dir)
        assert {g["pid"] for g in gateways} == set(pids_of(run_dir, "gateway"))
        assert {g["port"] for g in gateways} == {port}
        async with client_session() as http, asyncio.TaskGroup() as tasks:
            streams = [tasks.create_task(stream()) for _ in range(num_streams)]
            for _ in streams:
                await begun.acquire()
            killed, other = gateways
            num_other = await sessions_in_flight(http, other["own_port"])
            os.kill(killed["pid"], signal.SIGKILL)
            for _ in range(num_streams):  # the killed one's clients wait for its successor
                short = {**body, "max_tokens": 1, "stream": False}
                async with client_session() as new, new.post(url, json=short) as response:
                    assert response.status == 200
        assert 0 < num_other < num_streams
        assert [task.result() for task in streams].count(True) == num_other
        # The killed one stays listed until its lease has ended.
        state = read_state(run_dir)
        assert state is not None
        while len((await read_view(state.target())).gateways) != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        assert other["pid"] in pids_of(run_dir, "gateway")
    log = (run_dir / "logs" / "gateway-0.log").read_text()
    assert (
        log.count("gateway_listening")
        + (run_dir / "logs" / "gateway-1.log").read_text().count("gateway_listening")
        == 3
    )
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 0
    await gone(run_dir)


async def test_a_death_while_etcd_is_stopped_holds_nobody_up(run_dir: Path, model: Path) -> None:
    port, num_streams, num_tokens = free_port(), 8, 400
    url = f"http://127.0.0.1:{port}/v1/completions"

    async def answer(first: int) -> list[str]:
        body = {"prompt": [first, 4], "max_tokens": num_tokens, "ignore_eos": True, "seed": 1}
        async with client_session() as http, http.post(url, json=body) as response:
            assert response.status == 200, await response.text()
            return [choice["text"] for choice in (await response.json())["choices"]]

    process = await starfish(
        *("up", "--no-demo", "--ranks", "3", "--run-dir", str(run_dir), "--port", str(port)),
        *("--instance", run_dir.name, "--model", str(model), "--redundant-experts", "8"),
    )
    await started(process, run_dir)

    def control_plane_logs() -> str:
        return "".join(log.read_text() for log in (run_dir / "logs").glob("control-plane-?.log"))

    async with asyncio.timeout(WAIT_S):
        undisturbed = await asyncio.gather(*(answer(first) for first in range(num_streams)))
        (etcd_pid,) = [
            pid
            for each in processes_of(run_dir)
            if Path(f"/proc/{(pid := int(each.split()[0]))}/comm").read_text() == "etcd\n"
        ]
        os.kill(etcd_pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(0.2)
            rank_0 = next(int(p.split()[0]) for p in processes_of(run_dir) if "--rank 0" in p)
            answers = [asyncio.create_task(answer(first)) for first in range(num_streams)]
            await asyncio.sleep(0.1)
            os.kill(rank_0, signal.SIGKILL)
            assert await asyncio.gather(*answers) == undisturbed  # while etcd is still stopped
            assert control_plane_logs().count("map_offered") == 1
        finally:
            os.kill(etcd_pid, signal.SIGCONT)
        while "joined: 0." not in control_plane_logs():  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        assert await answer(0) == undisturbed[0]
    process.send_signal(signal.SIGINT)
    await process.communicate()
    await gone(run_dir)


async def test_only_one_instance_of_a_name_on_an_etcd(
    run_dir: Path, model: Path, tmp_path: Path, etcd: EmbeddedEtcd
) -> None:
    """A second run from another folder is refused, and interrupting it harms nobody."""
    await etcd.admit(Keys(run_dir.name))
    access = ("--etcd", etcd.endpoint, "--etcd-credentials", str(etcd.credentials))
    flags = ("--model", str(model), *access)
    process = await up(run_dir, free_port(), *flags)
    await started(process, run_dir)
    before = sorted(line.split()[0] for line in processes_of(run_dir))
    other = ("--run-dir", str(tmp_path / "other"), "--instance", run_dir.name)
    second = await starfish("up", "--no-demo", "--port", str(free_port()), *flags, *other)
    _, err = await second.communicate()
    assert second.returncode == 1
    assert f"pid {process.pid} on" in err.decode()
    third = await starfish("up", "--no-demo", "--port", str(free_port()), *flags, *other)
    await asyncio.sleep(0.5)
    third.send_signal(signal.SIGINT)
    await third.communicate()
    assert sorted(line.split()[0] for line in processes_of(run_dir)) == before
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 0
    await gone(run_dir)


async def answers(port: int) -> bool:
    """Whether a completion comes to its end."""
    body = {"model": "model", "prompt": "Hello", "max_tokens": 4}
    async with client_session() as http:
        models = await (await http.get(f"http://127.0.0.1:{port}/v1/models")).json()
        body["model"] = models["data"][0]["id"]
        async with http.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
            return response.status == 200 and bool((await response.json())["choices"])


async def leader_of(store: EtcdStore, keys: Keys) -> LeaderRecord | None:
    found = await store.get(keys.leader)
    return unpack_record(found.value, LeaderRecord) if found else None


async def succeeded(store: EtcdStore, keys: Keys, former: LeaderRecord) -> LeaderRecord:
    async with asyncio.timeout(50):
        while (leader := await leader_of(store, keys)) in (None, former):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert leader is not None
    return leader


async def test_a_leader_that_stops_or_is_killed_is_succeeded_before_its_lease_would_expire(
    run_dir: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that stops its ranks say so, as of one whose host is lost."""
    monkeypatch.setenv("STARFISH_CONTROL_PLANE_LEADER_TTL_S", "60")
    process = await up(run_dir, free_port(), "--model", str(model))
    await started(process, run_dir)
    state = read_state(run_dir)
    assert state is not None
    keys, store = Keys(run_dir.name), await connect_store(state.target().store)
    first = await leader_of(store, keys)
    assert first is not None
    os.kill(first.pid, signal.SIGSTOP)
    second = await succeeded(store, keys, first)
    os.kill(first.pid, signal.SIGCONT)
    (victim,) = [line for line in processes_of(run_dir) if "gpu_worker --rank 1 " in line]
    os.kill(second.pid, signal.SIGKILL)
    os.kill(int(victim.split()[0]), signal.SIGKILL)
    await succeeded(store, keys, second)
    async with asyncio.timeout(50):
        while not (await store.get_prefix(keys.verdicts)).values:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await store.close()
    process.send_signal(signal.SIGINT)
    await process.communicate()
    await gone(run_dir)


def etcd_of(run_dir: Path) -> int:
    (etcd,) = [line for line in processes_of(run_dir) if "/etcdbin/etcd " in line]
    return int(etcd.split()[0])


async def says(process: Process, text: str) -> None:
    assert process.stdout is not None
    while text.encode() not in (line := await process.stdout.readline()):
        assert line, "it has ended"


async def rejoins(run_dir: Path, rank: int) -> None:
    """Kills the rank, and waits until a map above the present one has its next incarnation."""
    state = read_state(run_dir)
    assert state is not None
    keys, store = Keys(run_dir.name), await connect_store(state.target().store)

    async def newest_map() -> ExpertMap:
        found = await store.get(keys.map)
        assert found is not None
        return unpack_map(found.value)

    before = await newest_map()
    (victim,) = [line for line in processes_of(run_dir) if f"gpu_worker --rank {rank} " in line]
    os.kill(int(victim.split()[0]), signal.SIGKILL)
    while True:
        after = await newest_map()
        incarnation = after.incarnation_of(RankId(rank))
        if incarnation not in (None, before.incarnation_of(RankId(rank))):
            break
        await asyncio.sleep(0.05)
    assert after.epoch > before.epoch
    assert (incarnation or 0) > (before.incarnation_of(RankId(rank)) or 0)
    await store.close()


async def test_an_etcd_that_cannot_restart_does_not_stop_serving(
    run_dir: Path, model: Path
) -> None:
    port = free_port()
    process = await up(run_dir, port, "--model", str(model))
    await started(process, run_dir)
    data, kept = run_dir / "etcd" / "data", run_dir / "etcd" / "kept"
    etcd = etcd_of(run_dir)
    data.rename(kept)
    data.write_text("no folder")  # as good as a disk that is full: etcd exits at every start
    os.kill(etcd, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        await says(process, "etcd does not start")
        assert await answers(port)
        data.unlink()
        kept.rename(data)
        await says(process, "etcd serves again")
        assert await answers(port)
        await rejoins(run_dir, 1)
        etcd = etcd_of(run_dir)
        for file in data.rglob("*"):
            if file.is_file():
                file.write_bytes(os.urandom(file.stat().st_size % (1 << 20)))
        os.kill(etcd, signal.SIGKILL)
        await says(process, "etcd's data are damaged")
        await says(process, "etcd serves again")
        assert await answers(port)
        while not await is_whole(run_dir, 2):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await rejoins(run_dir, 1)
        assert await answers(port)
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 0
    await gone(run_dir)


@pytest.fixture
def small_disk(run_dir: Path) -> Iterator[Path]:
    """The run folder as a file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    run_dir.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m,mode=0700", "tmpfs", str(run_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount a file system")
    yield run_dir
    subprocess.run(["umount", "--lazy", str(run_dir)], check=True)


def fill(folder: Path) -> Path:
    """Leaves no free byte."""
    path = folder / "fill"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return path


async def test_a_full_disk_stops_no_answer_and_when_it_has_room_everything_comes_back(
    small_disk: Path, model: Path
) -> None:
    port = free_port()
    process = await up(small_disk, port, "--model", str(model))
    await started(process, small_disk)
    async with asyncio.timeout(WAIT_S):
        filled = fill(small_disk)
        assert shutil.disk_usage(small_disk).free == 0
        os.kill(etcd_of(small_disk), signal.SIGKILL)
        (victim,) = [p for p in processes_of(small_disk) if "gpu_worker --rank 1 " in p]
        os.kill(int(victim.split()[0]), signal.SIGKILL)
        for _ in range(10):
            assert await answers(port)
            await asyncio.sleep(0.2)
        filled.unlink()
        while not await is_whole(small_disk, 2):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await rejoins(small_disk, 0)
        assert await answers(port)
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 0
    await gone(small_disk)


async def is_whole(run_dir: Path, num_ranks: int) -> bool:
    """Whether etcd answers, and its map has so many registered members."""
    state = read_state(run_dir)
    assert state is not None
    keys = Keys(run_dir.name)
    try:
        store = await connect_store(state.target().store)
    except StoreUnavailable:
        return False
    view = InstanceView.of(keys, (await store.get_prefix(keys.root)).values)
    await store.close()
    found = view.expert_map
    return found is not None and sum(found.has(r.member) for r in view.ranks) == num_ranks


async def test_only_one_instance_of_a_name(run_dir: Path, model: Path, tmp_path: Path) -> None:
    """Whether or not they share a run folder, an etcd or a port."""
    port = free_port()
    process = await up(run_dir, port, "--model", str(model))
    await started(process, run_dir)

    async def refused(*flags: str) -> str:
        second = await up(run_dir, free_port(), "--model", str(model), *flags)
        _, err = await second.communicate()
        assert second.returncode == 1
        (sentence,) = err.decode().strip().splitlines()
        return sentence

    for flags in ((), ("--port", str(port)), ("--run-dir", str(tmp_path / "other"))):
        sentence = await refused(*flags)
        assert f"instance {run_dir.name!r} is already running" in sentence
        assert f"pid {process.pid}" in sentence
    sentence = await refused("--instance", f"{run_dir.name}-2")
    assert f"is already running from {run_dir}" in sentence
    assert "--run-dir" in sentence, "another name and port do not help"
    elsewhere = ("--run-dir", str(tmp_path / "other"), "--instance", f"{run_dir.name}-2")
    sentence = await refused(*elsewhere, "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in sentence
    assert f"pid {process.pid}" in sentence
    assert process.returncode is None
    process.send_signal(signal.SIGINT)
    await process.communicate()
    await gone(run_dir)
