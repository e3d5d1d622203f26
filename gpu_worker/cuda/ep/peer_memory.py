"""Opens a peer's buffer in this process before Mooncake may map it.

CUDA counts how often a process has opened a buffer: the first time takes tens of milliseconds, any
further one nothing (`cuIpcOpenMemHandle` in NVIDIA's driver API). So a newcomer's buffer is opened
beside running steps, and the pause in which it is mapped is short.
"""

from __future__ import annotations

import ctypes
import socket

from gpu_worker.cuda.driver import driver
from shared.records import ExchangeHandles

_HANDLE_WORDS = 16
_LAZY_ENABLE_PEER_ACCESS = 1


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_int32 * _HANDLE_WORDS),)


def ipc_handle_of(handles: ExchangeHandles) -> IpcHandle | None:
    """None if the buffer is another host's, or is shared in another way."""
    if handles.host != socket.gethostname() or len(handles.ipc_handle) != _HANDLE_WORDS:
        return None
    return IpcHandle((ctypes.c_int32 * _HANDLE_WORDS)(*handles.ipc_handle))


class CudaPeerMemory:
    """Implements `mappings.PeerMemory`. For threads whose current context is the rank's."""

    def __init__(self) -> None:
        self._driver = driver()
        self._opened: dict[str, list[ctypes.c_uint64]] = {}  # as often as it was opened

    def open(self, handles: ExchangeHandles) -> None:
        """Nothing for a buffer of another host, which is not mapped. Raises RuntimeError."""
        handle = ipc_handle_of(handles)
        if handle is None:
            return
        address = ctypes.c_uint64()
        self._check(
            "opened",
            self._driver.cuIpcOpenMemHandle_v2(
                ctypes.byref(address), handle, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
            ),
        )
        self._opened.setdefault(handles.buffer_id, []).append(address)

    def close(self, handles: ExchangeHandles) -> None:
        """Of a buffer that was opened here, once for each time. It stays mapped if Mooncake has
        mapped it meanwhile. Raises RuntimeError."""
        if addresses := self._opened.get(handles.buffer_id):
            self._check("closed", self._driver.cuIpcCloseMemHandle(addresses.pop()))

    def _check(self, what: str, error: int) -> None:
        if error:
            raise RuntimeError(f"a peer's buffer cannot be {what}: error {error} of CUDA's driver")
