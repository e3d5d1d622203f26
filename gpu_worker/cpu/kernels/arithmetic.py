"""The arithmetic that all CPU kernels use, and how they are compiled and cached.

The kernels are batch-invariant by construction. Each output element is one chain of fused
multiply-adds in a fixed order (k ascending). Every multiply-add is an explicit `fma`, so no choice
of the compiler changes a bit. Blocking and unrolling only change which elements advance together.
So a result depends neither on the other rows of a call, nor on how a prompt was cut into chunks,
nor on which rank computed it, and machines with different vector widths agree.

Shape letters: T tokens of the step, S sequences (in `experts`: slots), B KV blocks of a sequence,
R wanted rows, H hidden size, P width of q+k+v, O width of all query heads, D head size,
V vocabulary, E experts, K top-k, I an expert's inner size, J its gate and up together, M rows that
this rank's experts compute, N (row, slot) pairs, C context positions that the score buffer has
columns for. Weights are transposed, `[inputs, outputs]`, or in panels (`tiles`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from shared.private_folder import cache_folder, prepare_cache

SHARED_SOURCES = ("arithmetic.py", "tiles.py", "linear.py", "attention.py")


def _cache_folder() -> str:
    """The name contains a hash of the sources that kernel files import from. Numba itself watches
    only the file of an entry point, so it would run old code after a change in one of the
    others."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in SHARED_SOURCES:
        digest.update((here / name).read_bytes())
    name = f"kernels-{digest.hexdigest()[:16]}"
    beside = here / "__pycache__"
    if os.access(beside if beside.exists() else here, os.W_OK):
        return str(beside / name)
    cache = cache_folder(os.environ)
    prepare_cache(cache)
    if (beside / name).exists():
        _link_built_kernels(beside / name, cache / name)
    return str(cache / name)


def _link_built_kernels(built: Path, target: Path) -> None:
    """Numba takes no folder that it cannot write, such as an image's. So `target` becomes one that
    it can write, with links to the kernels in `built`."""
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        linked = Path(scratch) / "kernels"
        shutil.copytree(built.resolve(), linked, copy_function=os.symlink)
        for folder in (linked, *(path for path in linked.iterdir() if path.is_dir())):
            folder.chmod(0o700)  # copytree copies the mode of a folder that nobody may write
        with contextlib.suppress(OSError):  # another rank of this host was faster
            linked.rename(target)


numba.config.CACHE_DIR = _cache_folder()  # type: ignore[attr-defined]

kernel: Any = njit(nogil=True, cache=True, error_model="numpy")
inlined: Any = njit(nogil=True, cache=True, error_model="numpy", inline="always")

_LOG2_E = np.float32(math.log2(math.e))
_LN_2_HIGH = np.float32(355 / 512)  # few bits, so that n * _LN_2_HIGH is exact
_LN_2_LOW = np.float32(math.log(2) - 355 / 512)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_EXP_MIN = np.float32(-87.0)
_EXP_MAX = np.float32(88.0)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
_EXP_2, _EXP_3, _EXP_4, _EXP_5, _EXP_6, _EXP_7 = (
    np.float32(1 / math.factorial(n)) for n in range(2, 8)
)


def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), build


def _float_bits(typing_context: Any, value: Any) -> Any:
    """The int32 that has the bits of a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


def _bits_float(typing_context: Any, value: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


# Any: numba's own annotation counts the typing context as an argument of the call.
fma: Any = intrinsic(_fma)
float_bits: Any = intrinsic(_float_bits)
bits_float: Any = intrinsic(_bits_float)


@inlined
def exp32(x: Any) -> Any:
    """e**x, clamped to float32's normal range. We have our own, because a library's result differs
    between its scalar and vector forms and between versions."""
    x = min(max(x, _EXP_MIN), _EXP_MAX)
    shifted = fma(x, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN_2_LOW, fma(n, -_LN_2_HIGH, x))
    p = fma(r, fma(r, fma(r, fma(r, fma(r, _EXP_7, _EXP_6), _EXP_5), _EXP_4), _EXP_3), _EXP_2)
    p = fma(r, fma(r, p, ONE), ONE)
    return bits_float(np.int32(float_bits(p) + (float_bits(shifted) << np.int32(23))))
