"""Device memory of one process that another one of the same card writes to: the few calls of CUDA's
driver that torch has no plain words for."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class SharedPlace(NamedTuple):
    """Where a tensor lies: CUDA's name for the allocation that holds it, and bytes from its
    start."""

    handle: bytes
    offset: int


class MappedValues:
    """Values of int32 that lie in another process's memory. Raises ConnectionError where that
    process is gone."""

    def __init__(self, place: SharedPlace, count: int) -> None:
        """The device that holds the memory must be the current one, here and in `close`."""
        self._base = ctypes.c_uint64()
        handle = _IpcHandle.from_buffer_copy(place.handle)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(self._base), handle, _LAZY_PEER_ACCESS)
        self._address = self._base.value + place.offset
        self._count = count

    def zero(self, stream: torch.cuda.Stream) -> None:
        """Enqueued, not awaited."""
        address, to = ctypes.c_uint64(self._address), ctypes.c_void_p(stream.cuda_stream)
        _call("cuMemsetD32Async", address, 0, ctypes.c_size_t(self._count), to)

    def close(self) -> None:
        _call("cuIpcCloseMemHandle", self._base)


def share(values: Tensor) -> SharedPlace:
    """Of a tensor that stays where it is for the life of this process."""
    address, handle = ctypes.c_uint64(values.data_ptr()), _IpcHandle()
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return SharedPlace(bytes(handle), address.value - base.value)


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


def _call(name: str, *arguments: object) -> None:
    if error := getattr(_driver(), name)(*arguments):
        raise ConnectionError(f"{name}: CUDA driver error {error}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
