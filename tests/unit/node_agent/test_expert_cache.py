"""The expert cache's memory goes to every rank, and outlives its agent as long as a rank has it."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from node_agent.expert_cache import with_expert_cache
from node_agent.rank_process import RankCommand, command_line_of, spawn
from shared.etcd_options import EtcdOptions
from shared.types import Incarnation, Member, NodeId, RankId

COMMAND = RankCommand(
    node=NodeId("expert-cache-test"),
    store=EtcdOptions(etcd="127.0.0.1:1"),
    instance="expert-cache",
    lifeline_fd=-1,
    extra_flags=("--static",),
    program=(sys.executable, "-c", "import signal; signal.pause()"),
)
MEMBER = Member(rank=RankId(3), incarnation=Incarnation(12))


def flags_of(command: RankCommand) -> dict[str, str]:
    return dict(pairwise(command.argv(MEMBER, 77)))


def test_ranks_are_told_which_descriptor_it_is() -> None:
    command = with_expert_cache(COMMAND, 0.5)
    fd = int(flags_of(command)["--host-experts-fd"])
    assert os.fstat(fd).st_size == 500_000_000
    assert "--host-experts-gb" not in flags_of(command)
    os.close(fd)


@pytest.mark.parametrize(
    "more", [("--device", "cpu"), ("--static", "--device=cpu"), ("--device", "cuda"), ()]
)
def test_ranks_that_have_none_make_none_of_their_own(more: tuple[str, ...]) -> None:
    host_experts_gb = 0.5 if more and more[-1].endswith("cpu") else 0.0
    command = with_expert_cache(replace(COMMAND, extra_flags=more), host_experts_gb)
    assert flags_of(command)["--host-experts-gb"] == "0"
    assert "--host-experts-fd" not in flags_of(command)


def test_a_device_of_the_ranks_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARFISH_RANK_DEVICE", "cpu")
    assert with_expert_cache(COMMAND, 0.5) == COMMAND
    told = with_expert_cache(replace(COMMAND, extra_flags=("--device", "auto")), 0.5)
    assert told.host_experts_fd >= 0
    os.close(told.host_experts_fd)


def test_a_later_agent_goes_on_with_the_memory_of_ranks_that_run(tmp_path: Path) -> None:
    first = with_expert_cache(COMMAND, 0.001)
    os.pwrite(first.host_experts_fd, b"copies", 4096)
    rank = spawn(
        first.argv(MEMBER, 77),
        environment=os.environ,
        pass_fds=[first.host_experts_fd],
        log_path=tmp_path / "log",
    )
    os.close(first.host_experts_fd)  # as at the agent's exit
    while not command_line_of(rank.pid):  # for a moment the kernel has not written it yet
        pass
    try:
        second = with_expert_cache(COMMAND, 0.5)
        assert os.pread(second.host_experts_fd, 6, 4096) == b"copies"
        os.close(second.host_experts_fd)
        other = with_expert_cache(replace(COMMAND, instance="other"), 0.001)
        assert os.pread(other.host_experts_fd, 6, 4096) == bytes(6)
        os.close(other.host_experts_fd)
    finally:
        rank.send_signal(signal.SIGKILL)
        rank.exit_code()
        rank.close()
