"""Compiling kernels ahead of the first step, and the types of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numba import types

EntryPoint = tuple[Any, tuple[Any, ...]]
"""A kernel that the model calls from Python, and the types of its arguments."""

FLOAT, INT, FLAG = types.float32, types.intp, types.boolean
FLOATS_1D, FLOATS_2D = FLOAT[::1], FLOAT[:, ::1]
FLOATS_3D, FLOATS_4D = FLOAT[:, :, ::1], FLOAT[:, :, :, ::1]
INTS_1D, INTS_2D = types.int32[::1], types.int32[:, ::1]


def _given(dtype: Any, ndim: int) -> Any:
    return types.Array(dtype, ndim, "C", readonly=True)


# What comes from outside the model may be read-only.
GIVEN_INTS_1D, GIVEN_INTS_2D = _given(types.int32, 1), _given(types.int32, 2)
GIVEN_FLOATS_2D, GIVEN_FLOATS_3D = _given(FLOAT, 2), _given(FLOAT, 3)


def compile_all(
    entry_points: Sequence[EntryPoint], on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Compiles the kernels (seconds of CPU each), or loads them from numba's cache (half a second
    for all). Afterwards a call with other types fails, where it would have stalled the engine with
    a compilation."""
    for done, (kernel, signature) in enumerate(entry_points):
        if signature not in kernel.signatures:
            kernel.disable_compile(False)
            kernel.compile(signature)
            kernel.disable_compile(True)
        if on_progress is not None:
            on_progress(done + 1, len(entry_points))
