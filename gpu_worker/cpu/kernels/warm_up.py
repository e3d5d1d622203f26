"""Compiling kernels ahead of the first step, and the types of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

EntryPoint = tuple[Any, tuple[Any, ...]]
"""A kernel that the model calls from Python, with the types of its arguments."""

FLOAT, INT, FLAG = types.float32, types.intp, types.boolean
FLOATS_1D, FLOATS_2D = FLOAT[::1], FLOAT[:, ::1]
FLOATS_3D, FLOATS_4D = FLOAT[:, :, ::1], FLOAT[:, :, :, ::1]
INTS_1D, INTS_2D = types.int32[::1], types.int32[:, ::1]


@dataclass(frozen=True, slots=True)
class Panels:
    """The type of weights in panels: float32, or bfloat16 as uint16, as the checkpoint stores them.
    All weights of one call have the same type."""

    ndim: int

    def of(self, dtype: np.dtype[Any]) -> Any:
        return types.Array(types.uint16 if dtype == np.uint16 else FLOAT, self.ndim, "C")


PANELS, PANELS_OF_SLOTS = Panels(3), Panels(4)

WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(np.uint16))


def _readonly(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "C", readonly=True)


# Arrays that are made outside the model may be read-only.
READONLY_INTS_1D, READONLY_INTS_2D = _readonly(types.int32, 1), _readonly(types.int32, 2)
READONLY_FLOATS_2D, READONLY_FLOATS_3D = _readonly(FLOAT, 2), _readonly(FLOAT, 3)


def compile_all(
    entry_points: Sequence[EntryPoint],
    on_progress: Callable[[int, int], None] | None = None,
    weight_dtypes: Sequence[np.dtype[Any]] = WEIGHT_DTYPES,
) -> None:
    """Compiles the kernels (seconds of CPU each) for weights of these types, or loads them from
    numba's cache (half a second for all). After that, a call with other types raises TypeError
    rather than stall the engine with a compilation."""
    wanted = [
        (kernel, signature)
        for kernel, arguments in entry_points
        for signature in _signatures(arguments, weight_dtypes)
    ]
    for done, (kernel, signature) in enumerate(wanted):
        if signature not in kernel.signatures:
            kernel.disable_compile(False)
            kernel.compile(signature)
            kernel.disable_compile(True)
        if on_progress is not None:
            on_progress(done + 1, len(wanted))


def _signatures(
    arguments: tuple[Any, ...], weight_dtypes: Sequence[np.dtype[Any]]
) -> list[tuple[Any, ...]]:
    if not any(isinstance(argument, Panels) for argument in arguments):
        return [arguments]
    return [
        tuple(
            argument.of(dtype) if isinstance(argument, Panels) else argument
            for argument in arguments
        )
        for dtype in weight_dtypes
    ]
