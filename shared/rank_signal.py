"""A signal to a rank's process on this host, if it is really that rank's."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from shared.errors import ConfigError
from shared.records import RankRecord


def send_to_rank(record: RankRecord, number: signal.Signals) -> None:
    """Signals the process only if its command line names this rank, and this incarnation or one
    before it, after which the process went on. Raises ConfigError."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except OSError as error:
        raise ConfigError(
            f"pid {record.pid} of rank {record.rank} is not on this host: {error.strerror}"
        ) from error
    try:
        command = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")
        rank, first_incarnation = (
            int(command[command.index(flag) + 1]) for flag in (b"--rank", b"--incarnation")
        )
        if rank != record.rank or first_incarnation > record.incarnation:
            raise ValueError
        signal.pidfd_send_signal(pidfd, number)
    except (ValueError, IndexError, OSError) as error:
        raise ConfigError(
            f"pid {record.pid} on this host is not rank {record.member}; run this on {record.node}"
        ) from error
    finally:
        os.close(pidfd)
