"""The small write that makes Mooncake connect to a peer, with retries until a deadline. The caller
chooses the thread, and first makes sure that the peer lives."""

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
    """Returns what went wrong, or an empty string. `submit` returns a batch, or 0. Blocks, and
    beyond `until` if the peer hangs. A broken connection hinders Mooncake for a while, so a failed
    write is tried again. A write that failed may still arrive later."""
    backoff_s = _RETRY_S
    error = _write_once(engine, submit, clock, until)
    while error and clock.now() + backoff_s < until:
        time.sleep(backoff_s)
        backoff_s *= 2
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
