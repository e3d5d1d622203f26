"""Names of faults, whom a command line belongs to, and the report of what was tried."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cli.bench.chaos.faults import all_faults, chosen_faults
from cli.bench.chaos.options import ChaosOptions
from cli.bench.chaos.picture import save_picture
from cli.bench.chaos.planned_changes import PlannedChange
from cli.bench.chaos.processes import ProcessKind, kind_of, processes_of, send
from cli.bench.chaos.report import FaultReport, is_exact, to_json
from cli.bench.chaos.statistics import Damage, TryResult
from cli.up.leftovers import RUN_VARIABLE
from control_plane.admin.change_answer import CHANGES
from shared.errors import ConfigError
from tests.unit.control_plane.desired import record

ROOT = Path(__file__).parents[3]


def result(
    *gaps_ms: float, damage: Damage | None = None, lost: int = 0, whole_s: float | None = 3.0
) -> TryResult:
    return TryResult(
        victim="rank 1",
        sessions=4,
        lost=lost,
        refused=0,
        errors=(),
        damage=damage or Damage(),
        gaps_ms=gaps_ms,
        return_gaps_ms=(),
        first_token_max_ms=0.0,
        before=10.0,
        during=5.0,
        after=9.0,
        held_s=0.0,
        whole_s=whole_s,
    )


def report(*tries: TryResult, target_ms: float | None = 100.0) -> FaultReport:
    points = ((0.5, 80.0), (1.0, 20.0))
    return FaultReport(
        name="kill-rank",
        summary="",
        target_ms=target_ms,
        usual_p99_ms=20.0,
        tries=tries,
        points=points,
    )


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("python -m gpu_worker --rank 3 --incarnation 7", (ProcessKind.RANK, 3)),
        ("python -m gpu_worker.fork_server --fork-channel 5", None),
        ("python -m gpu_worker", None),
        ("python -m gateway --listen-fd 5", (ProcessKind.GATEWAY, -1)),
        ("python -m gateway.standby 5", None),
        ("python -m control_plane", (ProcessKind.CONTROL_PLANE, -1)),
        ("python -m node_agent -- --rank 3", (ProcessKind.AGENT, -1)),
        ("/usr/bin/etcd --name embedded", (ProcessKind.ETCD, -1)),
        ("vim gateway/config.py", None),
        ("", None),
    ],
)
def test_the_kind_of_a_process(command: str, kind: tuple[ProcessKind, int] | None) -> None:
    assert kind_of(command.split()) == kind


def test_a_signal_reaches_only_a_process_with_the_mark(tmp_path: Path) -> None:
    (tmp_path / "gateway.py").write_text("import time\nprint(1, flush=True)\ntime.sleep(60)\n")
    ours, other = (
        subprocess.Popen(
            [sys.executable, "-m", "gateway"],
            cwd=tmp_path,
            env={**os.environ, RUN_VARIABLE: mark},
            stdout=subprocess.PIPE,
        )
        for mark in (f"test-{os.getpid()}", f"other-{os.getpid()}")
    )
    try:
        for process in (ours, other):
            assert process.stdout is not None
            process.stdout.readline()
        (found,) = processes_of(f"test-{os.getpid()}")
        assert (found.pid, found.kind) == (ours.pid, ProcessKind.GATEWAY)
        assert send(found, signal.SIGKILL)
        assert ours.wait(10) == -signal.SIGKILL
        assert not send(found, signal.SIGKILL)
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.communicate()


def test_faults_are_chosen_by_name() -> None:
    names = [fault.name for fault in all_faults()]
    assert len(names) == len(set(names))
    assert [fault.name for fault in chosen_faults("all", has_hosts=False)] == names
    chosen = chosen_faults("stop-rank, kill-rank", has_hosts=False)
    assert [fault.name for fault in chosen] == ["stop-rank", "kill-rank"]
    for wrong in ("kill-everything", "", "kill-rank,x"):
        with pytest.raises(ConfigError, match="kill-two-ranks"):
            chosen_faults(wrong, has_hosts=True)


def test_faults_that_need_several_hosts_are_refused_before_an_instance_starts() -> None:
    names = "kill-rank, kill-host, partition-ranks"
    assert len(chosen_faults(names, has_hosts=True)) == 3
    with pytest.raises(ConfigError, match=r"kill-host, partition-ranks: pass --hosts 3"):
        chosen_faults(names, has_hosts=False)


def test_every_fault_is_in_the_docs() -> None:
    _, _, text = (ROOT / "docs" / "chaos.md").read_text().partition("## The faults")
    told = set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE))
    assert told == {fault.name for fault in all_faults()}


def test_a_report_sums_its_tries() -> None:
    one = report(result(30.0, 50.0), result(90.0, damage=Damage(lost=2), lost=1, whole_s=5.0))
    assert (one.lost, one.damage, one.added_p99_ms) == (1, Damage(lost=2), 70.0)
    assert (one.gaps.p50, one.gaps.max, one.mean("during")) == (50.0, 90.0, 5.0)
    assert one.meets_target
    assert not report(result(120.0)).meets_target
    assert report(result(120.0), target_ms=None).meets_target is None


def test_a_run_is_exact_if_no_token_is_wrong_and_all_came_back() -> None:
    skipped = FaultReport(name="x", summary="", target_ms=None, skipped="not here")
    assert is_exact([report(result(1.0)), skipped])
    assert not is_exact([report(result(1.0, damage=Damage(changed=1)))])
    assert not is_exact([report(result(1.0, whole_s=None))])


def test_json_has_no_value_that_json_has_not() -> None:
    skipped = FaultReport(name="x", summary="", target_ms=None, skipped="not here")
    rows = to_json([report(result(whole_s=None)), skipped])
    assert rows[0]["gaps"]["p99"] is None
    assert "points" not in rows[0]
    json.dumps(rows, allow_nan=False)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_picture(tmp_path / "gaps.png", [report(result(30.0))])
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        save_picture(tmp_path / "none" / "gaps.png", [report(result(30.0))])
    with pytest.raises(ConfigError, match="no fault"):
        save_picture(tmp_path / "gaps.png", [])


def test_options_that_cannot_be() -> None:
    ChaosOptions().check()
    for wrong in (ChaosOptions(tries=0), ChaosOptions(streams=0), ChaosOptions(calm_s=0.0)):
        with pytest.raises(ConfigError, match="--"):
            wrong.check()


class FourRanks:
    """What a planned change asks of a site."""

    def ranks(self) -> list[int]:
        return [0, 1, 2, 3]


def test_the_admin_api_understands_what_a_planned_change_asks_for() -> None:
    bodies = {name: body for name, body, _ in CHANGES}
    changes = [fault for fault in all_faults() if isinstance(fault, PlannedChange)]
    asks = [
        ask(FourRanks(), record(1, "host"))  # type: ignore[arg-type]
        for each in changes
        for ask in (each.begin, each.end)
        if ask is not None
    ]
    assert {ask.name for ask in asks} == {
        *("drain", "undrain", "scale", "replace", "restart", "rebalance")
    }
    for ask in asks:
        msgspec.convert(ask.fields, bodies[ask.name])  # unknown fields are refused
