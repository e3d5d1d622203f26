"""Two small programs that test Mooncake's listeners. `hold_buffer HOST` registers a buffer, as a
rank does; it prints the buffer's address, and for every line of input whether the buffer is intact.
`overwrite_buffer HOST PORT ADDRESS` is an intruder that tries to overwrite it."""

from __future__ import annotations

import json
import os
import sys

import numpy as np

from gpu_worker.exchange.mooncake_engine import Protocols, open_engine

NBYTES = 65536


def hold_buffer(host: str) -> None:
    engine, name = open_engine(host, Protocols.TCP, "")
    buffer = np.full(NBYTES, 7, dtype=np.uint8)
    assert engine.register_memory(buffer.ctypes.data, NBYTES) == 0
    print(json.dumps({"name": name, "address": buffer.ctypes.data}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"intact": bool((buffer == 7).all())}), flush=True)
    os._exit(0)


def overwrite_buffer(host: str, port: str, address: str) -> None:
    engine, _ = open_engine("127.0.0.1", Protocols.TCP, "")
    junk = np.full(NBYTES, 66, dtype=np.uint8)
    assert engine.register_memory(junk.ctypes.data, NBYTES) == 0
    batch = engine.transfer_submit_write(f"{host}:{port}", junk.ctypes.data, int(address), NBYTES)
    status = -1
    if batch:
        while (status := engine.transfer_check_status(batch)) == 0:
            os.sched_yield()
    print(json.dumps({"status": status}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    {"hold_buffer": hold_buffer, "overwrite_buffer": overwrite_buffer}[sys.argv[1]](*sys.argv[2:])
