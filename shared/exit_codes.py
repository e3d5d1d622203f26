"""Exit codes: those of a rank's process that its node agent tells apart, and what any says in
words; and the signal by which an agent ends a rank."""

from __future__ import annotations

import signal

EXIT_FENCED = 75
"""A rank exits with this code if it was fenced, by a verdict or a map without it, and cannot go on
as a new incarnation of its process. That is no fault of its own, so the node agent restarts it at
once."""

EXIT_DEVICE_LOST = 74
"""A rank exits with this code if its process can use its accelerator no more, as after the failure
of a process that shares a context with it. Only another process can."""

END_AT_ONCE = signal.SIGHUP
"""A node agent sends this to a rank that is to end now. SIGTERM, which people and service managers
send, asks a rank to be drained first."""


def describe_exit(exit_code: int | None) -> str:
    """`exit_code` is negative for a signal, and None if nobody knows it."""
    if exit_code is None:
        return "exited"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exited with code {exit_code}"
