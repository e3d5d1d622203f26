"""`starfish kill`: a fault for a demo, injected as a real signal to a rank's process on this
host."""

from __future__ import annotations

from cli.observe.read_view import read_view
from cli.observe.signals import SIGNALS
from cli.run_dir import Target
from shared.errors import ConfigError
from shared.rank_signal import send_to_rank


async def kill_rank(target: Target, rank: int, signal_name: str) -> int:
    """Raises ConfigError if the rank does not run, or runs on another host."""
    number = SIGNALS.get(signal_name.upper().removeprefix("SIG"))
    if number is None:
        raise ConfigError(f"--signal {signal_name!r}: pass one of {', '.join(SIGNALS)}")
    view = await read_view(target)
    record = view.record_of(rank)
    if record is None:
        raise ConfigError(
            f"rank {rank} of instance {target.instance!r} does not run; `starfish status` shows "
            "which ranks do"
        )
    send_to_rank(record, number)
    print(f"sent {number.name} to rank {record.member} (pid {record.pid})")
    return 0
