"""Why a soak fails, and what it says of itself."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from cli.bench.chaos.statistics import Damage
from cli.bench.soak.growth import Growth, Quantity
from cli.bench.soak.load import LoadCount
from cli.bench.soak.options import SoakOptions
from cli.bench.soak.report import FaultCount, SoakReport, print_report, progress_line, to_json
from cli.bench.soak.requests import RequestKind
from cli.bench.soak.resources import Life, Sample
from shared.errors import ConfigError

MB = 1 << 20
STEADY = Growth(
    where="all gateway",
    quantity=Quantity.MEMORY,
    lasted_s=600.0,
    first=100.0 * MB,
    middle=101.0 * MB,
    last=102.0 * MB,
    tolerance=8.0 * MB,
    per_hour=12.0 * MB,
)
LEAK = replace(STEADY, where="gateway (pid 7)", middle=120.0 * MB, last=140.0 * MB)
REPORT = SoakReport(
    minutes=10.0,
    load={"chat": LoadCount(sent=5, tokens=320)},
    faults={"kill-rank": FaultCount(whole_s=[3.0, 5.0])},
    lives=(replace(STEADY, where="gateway (pid 7)"),),
    sums=(STEADY,),
    ended_early=None,
)


def test_a_steady_exact_soak_has_passed() -> None:
    assert REPORT.reasons() == []


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (
            replace(REPORT, lives=(LEAK,)),
            "growth: memory of gateway (pid 7) from 100.0 MB to 140.0 MB in 10 min "
            "(tolerance 8.0 MB)",
        ),
        (
            replace(REPORT, load={"chat": LoadCount(sent=1, damage=Damage(changed=2))}),
            "chat: 0 tokens lost, 0 doubled, 2 changed",
        ),
        (
            replace(REPORT, faults={"drain": FaultCount(failed=["no room"])}),
            "drain failed: no room",
        ),
        (replace(REPORT, ended_early="not whole again"), "not whole again"),
    ],
)
def test_each_fault_has_its_reason(report: SoakReport, reason: str) -> None:
    assert report.reasons() == [reason]
    assert json.loads(json.dumps(to_json(report)))["reasons"] == [reason]


def test_the_tables_name_what_was_measured() -> None:
    out = io.StringIO()
    print_report(replace(REPORT, lives=(LEAK,)), Console(file=out, width=160))
    text = out.getvalue()
    assert "kill-rank" in text
    assert "140.0 MB" in text
    assert "failed: growth: memory of gateway (pid 7)" in text
    assert "nothing grew" not in text


def test_a_line_of_progress_sums_over_processes() -> None:
    process = {Quantity.MEMORY: 100.0 * MB, Quantity.THREADS: 4.0}
    sample = Sample(
        at=0.0,
        is_whole=True,
        processes={Life(1, 0, "gateway"): process, Life(2, 0, "gpu_worker"): process},
        instance={Quantity.ETCD_KEYS: 31.0},
    )
    loads = {RequestKind.CHAT: LoadCount(sent=5, tokens=320, refused=1)}
    line = progress_line(120.0, loads, REPORT.faults, sample)
    assert line.startswith("2 min: 2 faults, 5 requests, 320 tokens, 1 lost, 0 wrong, 2 processes")
    assert "memory 200.0 MB" in line
    assert "threads 8" in line
    assert "etcd keys 31" in line


@pytest.mark.parametrize("change", [{"minutes": 0.0}, {"clients": 0}, {"warm_up_s": -1.0}])
def test_impossible_options_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="pass"):
        replace(SoakOptions(), **change).check()  # type: ignore[arg-type]
