"""`starfish bench soak` with real processes: each kind of request is answered exactly during
faults, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from cli.bench.chaos.processes import command_of, pids_of
from cli.bench.soak.requests import RequestKind

LIMIT_S = 240.0
NO_MARK = "no process has this mark"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]


async def start(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", "bench", "soak", "--ranks", "2", "--clients", "4"),
        *("--every-s", "4", "--new-tokens", "16", "--long-tokens", "200", *flags),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )


async def end_of(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    try:
        async with asyncio.timeout(LIMIT_S):
            return await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def test_answers_are_exact_during_faults(tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    faults = "stop-rank,stop-gateway"
    process = await start("--minutes", "0.4", "--faults", faults, "--report", str(file), "--json")
    out, err = await end_of(process)
    assert process.returncode == 0, err.decode()[-4000:]
    report = json.loads(out)
    assert report == json.loads(file.read_text())
    assert report["num_faults"] >= 2
    assert report["reasons"] == []
    assert report["load"].keys() == {kind.value for kind in RequestKind}
    for count in report["load"].values():
        assert count["tokens"] > 0
        assert count["wrong"] == 0


async def test_ctrl_c_leaves_nothing_behind() -> None:
    process = await start("--minutes", "5", "--faults", "all")
    assert process.stdout is not None
    said = b""
    async with asyncio.timeout(LIMIT_S):
        while b"left out" not in said:  # those of several hosts are; now it begins
            piece = await process.stdout.read(1024)
            assert piece, "it has ended"
            said += piece
    (owner,) = [pid for pid in pids_of(NO_MARK, process.pid) if is_up(pid)]
    services = set(pids_of(NO_MARK, owner))
    assert len(services) > 3
    process.send_signal(signal.SIGINT)
    await end_of(process)
    assert process.returncode == 130
    async with asyncio.timeout(60):
        while any(Path(f"/proc/{pid}").exists() for pid in services):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def is_up(pid: int) -> bool:
    """Whether it is a `starfish up`."""
    try:
        return "up" in command_of(pid)
    except OSError:
        return False
