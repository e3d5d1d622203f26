"""Block-scaled number formats of checkpoints, decoded to float32: FP8 (E4M3 with a scale for each
block of a matrix) and MXFP4 (E2M1 in groups of 32, each with a power of two). Pure; knows no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

MXFP4_GROUP = 32
MXFP4_GROUP_BYTES = MXFP4_GROUP // 2

_E4M3_NAN = 0x7F  # and 0xFF; the format has no infinity
_E4M3_TO_FLOAT = np.float32(2.0**120)  # float32's exponents are biased by 120 more
_E8M0_BIAS = 127
_E8M0_NAN = 0xFF

# How much is decoded at once, so that all passes over it find it in the cache.
_FP8_VALUES_MAX = 2**17
_MXFP4_GROUPS_MAX = 2**14


def _mxfp4_pairs() -> Floats:
    """`[scale, byte, 2]`: the two values of every byte for every scale, the low nibble first."""
    magnitudes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
    values = np.concatenate([magnitudes, -magnitudes])
    pairs: Floats = values[np.arange(256)[:, np.newaxis] >> np.array([0, 4]) & 15]
    # 2^-127 is a subnormal of float32, and exact. The last entry is for NaN and is never used.
    scales = np.ldexp(np.float32(1), np.minimum(np.arange(256), _E8M0_NAN - 1) - _E8M0_BIAS)
    with np.errstate(over="ignore"):  # 4 and 6 times 2^127 are infinite, as in other readers
        pairs_by_scale: Floats = pairs * scales[:, np.newaxis, np.newaxis]
    return pairs_by_scale


# Each pair as one word, so that a look-up copies one word.
_FLOAT_PAIRS = _mxfp4_pairs().view(np.uint64).reshape(-1)
_BFLOAT_PAIRS = (_mxfp4_pairs().view(np.uint32) >> 16).astype(np.uint16).view(np.uint32).reshape(-1)


def check_fp8(codes: Codes, scales: NDArray[Any]) -> None:
    """Raises ValueError if a code is NaN or a scale is not finite."""
    if not np.isfinite(scales).all():
        raise ValueError("has a scale that is not finite")
    if (codes & 0x7F).max(initial=0) == _E4M3_NAN:
        raise ValueError("holds NaN")


def check_mxfp4(scales: Codes) -> None:
    """Raises ValueError if a scale is NaN."""
    if scales.max(initial=0) == _E8M0_NAN:
        raise ValueError("has a scale that is NaN")


def decode_fp8_blocks(codes: Codes, scales: NDArray[Any], block: tuple[int, int]) -> Floats:
    """`codes` are uint8 `[..., N, K]`; `scales` are `[..., ceil(N/n), ceil(K/k)]` for blocks `[n,
    k]`, of which the last in a row or column may be partial. Each value is that of its code times
    its block's scale, rounded once to float32. Raises ValueError if a code is NaN or a scale is not
    finite."""
    if not np.isfinite(scales).all():
        raise ValueError("has a scale that is not finite")
    num_rows, num_columns = codes.shape[-2:]
    scales_by_column = np.repeat(scales.astype(np.float32), block[1], axis=-1)[..., :num_columns]
    values: Floats = np.empty(codes.shape, dtype=np.float32)
    rows_max = max(1, _FP8_VALUES_MAX // num_columns)
    for matrix in np.ndindex(codes.shape[:-2]):
        for row, first in enumerate(range(0, num_rows, block[0])):
            end = min(first + block[0], num_rows)
            for start in range(first, end, rows_max):
                rows = slice(start, min(start + rows_max, end))
                _widen_e4m3(codes[matrix][rows], values[matrix][rows])
                values[matrix][rows] *= scales_by_column[matrix][row]
    return values


def _widen_e4m3(codes: Codes, values: Floats) -> None:
    """Moves sign, exponent and mantissa to their places in float32, also for subnormals. Raises
    ValueError if a code is NaN."""
    if (codes & 0x7F).max(initial=0) == _E4M3_NAN:
        raise ValueError("holds NaN")
    bits = values.view(np.int32)
    bits[...] = codes.view(np.int8)  # the sign is repeated up to bit 31
    bits <<= 20
    bits &= ~0x78000000
    values *= _E4M3_TO_FLOAT


def decode_mxfp4(blocks: Codes, scales: Codes) -> Floats:
    """`blocks` are uint8 `[..., G, 16]`, `scales` uint8 `[..., G]`; returns float32 `[..., 32 *
    G]`. Raises ValueError if a scale is NaN."""
    return _look_up(_FLOAT_PAIRS, blocks, scales).view(np.float32)


def decode_mxfp4_bits(blocks: Codes, scales: Codes) -> NDArray[np.uint16]:
    """`decode_mxfp4` as bfloat16 bits. Exact: a code has two significant bits."""
    return _look_up(_BFLOAT_PAIRS, blocks, scales).view(np.uint16)


def _look_up(pairs: NDArray[Any], blocks: Codes, scales: Codes) -> NDArray[Any]:
    """`[..., 16 * G]` words of `pairs`."""
    check_mxfp4(scales)
    found = np.empty(blocks.shape, dtype=pairs.dtype)
    of_groups = found.reshape(-1, MXFP4_GROUP_BYTES)
    bytes_of_groups, scale_of_groups = blocks.reshape(of_groups.shape), scales.reshape(-1, 1)
    for first in range(0, len(of_groups), _MXFP4_GROUPS_MAX):
        groups = slice(first, first + _MXFP4_GROUPS_MAX)
        places = scale_of_groups[groups].astype(np.uint16) << 8 | bytes_of_groups[groups]
        np.take(pairs, places, out=of_groups[groups], mode="clip")
    return found.reshape(*blocks.shape[:-2], -1)
