"""What is asked of CUDA's driver itself, past torch. Makes no context on any card."""

from __future__ import annotations

import ctypes


def card_bytes(card: int) -> int:
    """Of all memory of a card, by its number for this process. Raises OSError."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, total = ctypes.c_int(), ctypes.c_size_t()
    error = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), card)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    )
    if error:
        raise OSError(f"CUDA's driver does not tell the memory of card {card}: error {error}")
    return total.value
