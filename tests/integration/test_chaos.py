"""`starfish bench chaos` with real processes: on an instance of `starfish up`, and on three hosts
as network namespaces. Neither loses a token, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.bench.chaos.network import networks_are_possible
from cli.bench.chaos.processes import processes_of

MODEL = Path(__file__).parents[2] / "models" / "starling-14m"
LIMIT_S = 240

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 40)]


async def chaos(faults: str, *flags: str) -> list[dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", "bench", "chaos", "--model", str(MODEL), "--ranks", "3"),
        *("--faults", faults, "--tries", "1", "--streams", "6", "--prompts", "6"),
        *("--calm-s", "0.5", "--json", *flags),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode == 0, err.decode()[-4000:]
    reports: list[dict[str, Any]] = json.loads(out)
    return reports


def check(reports: list[dict[str, Any]], *names: str) -> None:
    assert [report["name"] for report in reports] == list(names)
    for report in reports:
        assert report["skipped"] is None
        assert report["lost"] == 0
        assert report["damage"] == {"lost": 0, "doubled": 0, "changed": 0}
        (tried,) = report["tries"]
        assert tried["sessions"] >= 6
        assert tried["whole_s"] is not None


async def test_an_instance_of_its_own() -> None:
    check(await chaos("kill-rank,stop-etcd", "--own"), "kill-rank", "stop-etcd")


@pytest.mark.skipif(networks_are_possible() is not None, reason=str(networks_are_possible()))
async def test_three_hosts() -> None:
    names = ("partition-ranks", "partition-gateway-ranks")
    check(await chaos(",".join(names), "--hosts", "3"), *names)
    assert processes_of("chaos-") == []
