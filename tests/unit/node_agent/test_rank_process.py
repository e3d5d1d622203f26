"""A rank is recognised by its command line, and only by all of it."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest

from node_agent.rank_process import RankCommand, spawn
from node_agent.rank_supervisor import RunningRank
from shared.etcd_options import EtcdOptions
from shared.types import Incarnation, Member, NodeId, RankId

COMMAND = RankCommand(
    node=NodeId("a"),
    store=EtcdOptions(etcd="127.0.0.1:2379"),
    instance="blue",
    lifeline_fd=5,
    extra_flags=("--model", "/models/m", "--static"),
    program=("python", "-m", "gpu_worker"),
)
RUNNING_RANK = RunningRank(
    member=Member(rank=RankId(3), incarnation=Incarnation(12)), lease_id=77, pid=42
)


def test_a_command_line_identifies_its_incarnation() -> None:
    argv = COMMAND.argv(RUNNING_RANK.member, RUNNING_RANK.lease_id)
    assert COMMAND.running_rank_of(42, argv) == RUNNING_RANK


def test_another_interpreter_path_and_lifeline_are_the_same_rank() -> None:
    later = dataclasses.replace(COMMAND, lifeline_fd=9, program=("py", "-m", "gpu_worker"))
    assert (
        later.running_rank_of(42, COMMAND.argv(RUNNING_RANK.member, RUNNING_RANK.lease_id))
        == RUNNING_RANK
    )


@pytest.mark.parametrize(
    "change",
    [
        {"node": NodeId("b")},
        {"instance": "green"},
        {"store": EtcdOptions(etcd="127.0.0.1:2380")},
        {"program": ("python", "-m", "node_agent")},
    ],
)
def test_a_stranger_is_not_adopted(change: dict[str, object]) -> None:
    other = dataclasses.replace(COMMAND, **change)  # type: ignore[arg-type]
    assert (
        COMMAND.running_rank_of(42, other.argv(RUNNING_RANK.member, RUNNING_RANK.lease_id)) is None
    )


@pytest.mark.parametrize("argv", [[], ["python"], ["python", "-m", "gpu_worker"], ["vi", "x"]])
def test_an_incomplete_command_line_is_no_rank(argv: list[str]) -> None:
    assert COMMAND.running_rank_of(42, argv) is None


def test_a_garbled_number_is_no_rank() -> None:
    argv = COMMAND.argv(RUNNING_RANK.member, RUNNING_RANK.lease_id)
    argv[argv.index("--rank") + 1] = "three"
    assert COMMAND.running_rank_of(42, argv) is None


def test_a_stop_and_what_ends_it_are_seen_once_and_an_exit_is_neither(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    process = spawn(argv, environment=os.environ, pass_fds=(), log_path=tmp_path / "log")
    try:
        assert process.poll_stopped() is None
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PIDFD, process.fileno(), os.WSTOPPED | os.WNOWAIT)
        assert process.poll_stopped() is True
        assert process.poll_stopped() is None
        process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PIDFD, process.fileno(), os.WCONTINUED | os.WNOWAIT)
        assert process.poll_stopped() is False
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.exit_code() == -signal.SIGKILL
    assert process.poll_stopped() is None
    process.close()
