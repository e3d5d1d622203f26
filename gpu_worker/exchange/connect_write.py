"""The small writes at the two ends of a connection of Mooncake's: the first, which makes it
connect, and one to a process that has ended, which makes it close its socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from gpu_worker.exchange.mooncake_engine import TransferEngine
from shared.clock import Clock

_POLL_S = 0.001
_RETRY_S = 0.1
_END_POLL_S = 0.2
_END_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 5.0


def connect_write(
    engine: TransferEngine, submit: Callable[[], int], clock: Clock, until: float
) -> str:
    """Returns what went wrong, or an empty string. `submit` returns a batch, or 0. The caller
    chooses the thread, and first makes sure that the peer lives. Blocks, and beyond `until` if the
    peer hangs. A broken connection hinders Mooncake for a while, so a failed
    write is tried again. A write that failed may still arrive later."""
    backoff_s = _RETRY_S
    error = _write_once(engine, submit, clock, until)
    while error and clock.now() + backoff_s < until:
        time.sleep(backoff_s)
        backoff_s *= 2
        error = _write_once(engine, submit, clock, until)
    return error


def close_after_exit(
    engine: TransferEngine,
    submit: Callable[[], int],
    clock: Clock,
    control_address: tuple[str, int],
) -> None:
    """Returns at once. Mooncake keeps its socket to a process that has ended until a write over it
    fails, so a thread submits one more write. First it waits until the peer's control port refuses
    a connection: then the peer's kernel has answered, and the write cannot block others, as one to
    a host that hangs would. If nothing is refused within a minute the socket stays. `submit`
    returns a batch, or 0; its write must harm nobody if the process lives after all."""

    def close() -> None:
        until = clock.now() + _END_TIMEOUT_S
        while not _is_refused(control_address):
            if clock.now() >= until:
                return
            time.sleep(_END_POLL_S)
        _write_once(engine, submit, clock, clock.now() + _CLOSE_TIMEOUT_S)

    # A daemon thread: nobody waits for it when the process ends.
    threading.Thread(target=close, name="close-connection", daemon=True).start()


def _is_refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


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
