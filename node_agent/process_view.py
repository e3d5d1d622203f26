"""What the kernel says of a rank's process: whether it runs, waits for a CPU, sleeps, or is
stopped. Silence alone cannot tell a starved process from a hung one; this can.

Two samples some milliseconds apart are compared:

    the process is stopped (state T or t)             stopped
    it has used CPU time between them                 running
    it has waited for a CPU, or is about to run       starved
    none of these                                     sleeping

All threads of a process count: a rank's engine runs while its event loop sleeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.types import ProcessState

# Fields of /proc/PID/stat, counted from the one after the command's closing bracket.
_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12
_STOPPED_STATES = frozenset({b"T", b"t"})
_RUNNABLE = b"R"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """`cpu_ticks`: used by all threads, in clock ticks. `run_ns` and `wait_ns`: for how long the
    threads that live now have been on a CPU, and have been runnable without one."""

    is_stopped: bool
    is_runnable: bool
    cpu_ticks: int
    run_ns: int
    wait_ns: int


def classify(before: ProcessSample, after: ProcessSample) -> ProcessState:
    """What the process did between two samples."""
    if after.is_stopped:
        return ProcessState.STOPPED
    if after.cpu_ticks > before.cpu_ticks or after.run_ns > before.run_ns:
        return ProcessState.RUNNING
    if after.is_runnable or after.wait_ns > before.wait_ns:
        return ProcessState.STARVED
    return ProcessState.SLEEPING


def sample_process(pid: int, proc: Path = Path("/proc")) -> ProcessSample:
    """Raises OSError if there is no such process any more."""
    folder = proc / str(pid)
    fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
    run_ns = wait_ns = 0
    is_runnable = False
    for task in (folder / "task").iterdir():
        try:
            ran, waited = _parse_schedstat((task / "schedstat").read_bytes())
            is_runnable |= _state_of((task / "stat").read_bytes()) == _RUNNABLE
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended meanwhile
        run_ns += ran
        wait_ns += waited
    return ProcessSample(
        is_stopped=fields[_STATE] in _STOPPED_STATES,
        is_runnable=is_runnable,
        cpu_ticks=int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS]),
        run_ns=run_ns,
        wait_ns=wait_ns,
    )


def _parse_schedstat(text: bytes) -> tuple[int, int]:
    """Nanoseconds on a CPU, and runnable without one. Zeros if this kernel does not count them."""
    fields = text.split()
    return (int(fields[0]), int(fields[1])) if len(fields) >= 2 else (0, 0)


def _state_of(stat: bytes) -> bytes:
    return stat.rpartition(b")")[2].split()[_STATE]
