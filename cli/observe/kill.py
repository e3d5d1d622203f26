"""`starfish kill`: a fault for a demo, injected as a real signal to a rank's process on this
host."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cli.observe.instance_view import InstanceView
from cli.observe.signals import SIGNALS
from cli.run_dir import Target
from shared.errors import ConfigError
from shared.etcd_store import connect_store
from shared.keys import Keys
from shared.records import RankRecord


async def kill_rank(target: Target, rank: int, signal_name: str) -> int:
    """Raises ConfigError if the rank does not run, or runs on another host."""
    number = SIGNALS.get(signal_name.upper().removeprefix("SIG"))
    if number is None:
        raise ConfigError(f"--signal {signal_name!r}: pass one of {', '.join(SIGNALS)}")
    keys = Keys(target.instance)
    store = await connect_store(target.store)
    try:
        view = InstanceView.of(keys, (await store.get_prefix(keys.root)).values)
    finally:
        await store.close()
    record = view.record_of(rank)
    if record is None:
        raise ConfigError(
            f"rank {rank} of instance {target.instance!r} does not run; `starfish status` shows "
            "which ranks do"
        )
    send_to_rank(record, number)
    print(f"sent {number.name} to rank {record.member} (pid {record.pid})")
    return 0


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
