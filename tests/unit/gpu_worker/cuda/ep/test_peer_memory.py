"""How a peer's memory handle is handed to CUDA's driver."""

from __future__ import annotations

import socket
import struct

from gpu_worker.cuda.ep.peer_memory import ipc_handle_of
from shared.records import ExchangeHandles


def handles(host: str, ipc_handle: tuple[int, ...]) -> ExchangeHandles:
    return ExchangeHandles(
        host=host,
        address=0,
        remote_key=0,
        subnet_prefix=0,
        interface_id=0,
        queue_pairs=(),
        local_ids=(),
        ipc_handle=ipc_handle,
        step_tokens_max=1,
        buffer_id="one",
    )


def test_a_handle_is_handed_on_byte_for_byte_with_its_zeros() -> None:
    words = (0, 7, -1, 0, 0, 2**31 - 1, -(2**31), *range(9))
    handle = ipc_handle_of(handles(socket.gethostname(), words))
    assert handle is not None
    assert bytes(handle) == struct.pack("16i", *words)


def test_what_is_not_on_this_host_or_no_such_handle_is_not_opened() -> None:
    assert ipc_handle_of(handles("another", tuple(range(16)))) is None
    assert ipc_handle_of(handles(socket.gethostname(), ())) is None
