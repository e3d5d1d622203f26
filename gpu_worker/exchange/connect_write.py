"""The small write that makes Mooncake connect to a peer, tried again while there is time. On which
thread, and after what proof that the peer lives, is the caller's matter."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpu_worker.exchange.mooncake_engine import TransferEngine
from shared.clock import Clock

_POLL_S = 0.001
_RETRY_S = 0.1


def connect_write(
    engine: TransferEngine, submit: Callable[[], int], clock: Clock, until: float
) -> str:
    """What went wrong, or nothing. Blocks, and beyond `until` where the peer hangs. A broken
    connection is in Mooncake's way for a while, so a failure is not the end; a write that failed
    may land later all the same."""
    pause_s = _RETRY_S
    error = _write_once(engine, submit, clock, until)
    while error and clock.now() + pause_s < until:
        time.sleep(pause_s)
        pause_s *= 2
        error = _write_once(engine, submit, clock, until)
    return error


def _write_once(
    engine: TransferEngine, submit: Callable[[], int], clock: Clock, until: float
) -> str:
    batch = submit()
    status = 0 if batch else -1
    while status == 0 and clock.now() < until:
        time.sleep(_POLL_S)
        status = engine.transfer_check_status(batch)
    if status == 1:
        return ""
    return "failed" if status == -1 else "timed out"
