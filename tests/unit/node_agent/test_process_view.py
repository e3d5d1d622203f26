"""What the kernel says of real processes: one computes, one sleeps, one waits for a CPU."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from node_agent.process_view import ProcessSample, classify, sample_process
from shared.types import ProcessState

IDLE = ProcessSample(is_stopped=False, is_runnable=False, cpu_ticks=5, run_ns=100, wait_ns=10)
BUSY_PROGRAM = "print(flush=True)\nwhile True: pass"
IDLE_PROGRAM = "import time; print(flush=True); time.sleep(600)"
PATIENCE_S = 60.0


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, ProcessState.SLEEPING),
        ({"cpu_ticks": 6}, ProcessState.RUNNING),
        ({"run_ns": 101}, ProcessState.RUNNING),
        ({"wait_ns": 11}, ProcessState.STARVED),
        ({"is_runnable": True}, ProcessState.STARVED),
        ({"run_ns": 101, "wait_ns": 11}, ProcessState.RUNNING),
        ({"is_stopped": True, "run_ns": 101}, ProcessState.STOPPED),
    ],
)
def test_two_samples_say_what_the_process_did(change: dict[str, int], state: ProcessState) -> None:
    assert classify(IDLE, dataclasses.replace(IDLE, **change)) is state


@contextmanager
def process_of(program: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def observe(pid: int, seconds: float = 0.2) -> ProcessState:
    before = sample_process(pid)
    time.sleep(seconds)
    return classify(before, sample_process(pid))


def observe_after(pid: int, *before: ProcessState) -> ProcessState:
    """The first state that is none of those in which it may be for a while on a busy machine."""
    until = time.monotonic() + PATIENCE_S
    while (state := observe(pid)) in before and time.monotonic() < until:
        pass
    return state


def test_a_process_that_computes_is_running_and_a_stopped_one_is_stopped() -> None:
    with process_of(BUSY_PROGRAM) as pid:
        assert observe_after(pid, ProcessState.STARVED) is ProcessState.RUNNING
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        assert observe(pid, 0.01) is ProcessState.STOPPED
        os.kill(pid, signal.SIGCONT)
        assert observe_after(pid, ProcessState.STARVED) is ProcessState.RUNNING


def test_a_process_that_waits_for_nothing_but_time_sleeps() -> None:
    """Once it has come so far."""
    with process_of(IDLE_PROGRAM) as pid:
        on_its_way = (ProcessState.STARVED, ProcessState.RUNNING)
        assert observe_after(pid, *on_its_way) is ProcessState.SLEEPING
        assert observe(pid) is ProcessState.SLEEPING


def test_a_process_that_gets_no_cpu_is_starved_or_runs_at_last() -> None:
    """Of three that want one CPU, none is ever seen to sleep."""
    cpu = min(os.sched_getaffinity(0))
    with (
        process_of(BUSY_PROGRAM) as first,
        process_of(BUSY_PROGRAM) as second,
        process_of(BUSY_PROGRAM) as third,
    ):
        for pid in (first, second, third):
            os.sched_setaffinity(pid, {cpu})
        seen = {observe(pid, 0.002) for _ in range(20) for pid in (first, second, third)}
    assert ProcessState.STARVED in seen
    assert seen <= {ProcessState.STARVED, ProcessState.RUNNING}


def test_a_process_that_is_gone_is_an_error() -> None:
    with process_of(IDLE_PROGRAM) as pid:
        pass
    with pytest.raises(OSError, match="No such"):
        sample_process(pid)
