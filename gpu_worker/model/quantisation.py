"""Block-scaled number formats of checkpoints, decoded to float32: FP8 (E4M3 with a scale for each
block of a matrix) and MXFP4 (E2M1 in groups of 32 with a power of two each). Pure; knows no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

MXFP4_GROUP = 32
MXFP4_GROUP_BYTES = MXFP4_GROUP // 2

_E4M3_BIAS = 7
_E4M3_NAN = 0x7F  # and 0xFF; the format has no infinity
_E8M0_BIAS = 127
_E8M0_NAN = 0xFF


def _e4m3_table() -> Floats:
    """One sign, four exponent and three mantissa bits; exponent 0 is subnormal."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    subnormal = exponents == 0
    significands = np.where(subnormal, mantissas, mantissas + 8) / 8.0
    values = np.ldexp(significands, np.where(subnormal, 1, exponents) - _E4M3_BIAS)
    values = np.where(codes & 0x7F == _E4M3_NAN, np.nan, values)
    return np.where(codes & 0x80, -values, values).astype(np.float32)


def _e2m1_pair_table() -> NDArray[np.uint64]:
    """The two values of each byte, low nibble first, as one word: it is copied three times faster
    than a row of two."""
    magnitudes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
    values = np.concatenate([magnitudes, -magnitudes])
    codes = np.arange(256)
    pairs = np.stack([values[codes & 15], values[codes >> 4]], axis=1)
    return pairs.view(np.uint64)[:, 0].copy()


_E4M3 = _e4m3_table()
_E2M1_PAIRS = _e2m1_pair_table()
# 2^-127 is a subnormal of float32, and exact. The last entry stands for NaN and is never used.
_E8M0 = np.ldexp(np.float32(1), np.minimum(np.arange(256), _E8M0_NAN - 1) - _E8M0_BIAS)


def decode_fp8_blocks(codes: Codes, scales: NDArray[Any], block: tuple[int, int]) -> Floats:
    """`codes` `[..., N, K]`, `scales` `[..., ceil(N/n), ceil(K/k)]` of blocks `[n, k]`, of which
    the last of a row or column may be cut short. Each value is its code's times its block's scale,
    rounded once. Raises ValueError where a code is NaN or a scale is not finite."""
    if (codes & 0x7F == _E4M3_NAN).any():
        raise ValueError("holds NaN")
    if not np.isfinite(scales).all():
        raise ValueError("has a scale that is not finite")
    num_rows, block_rows, num_columns = codes.shape[-2], block[0], codes.shape[-1]
    values = _E4M3[codes]
    scales_by_column = np.repeat(scales.astype(np.float32), block[1], axis=-1)[..., :num_columns]
    for row, first in enumerate(range(0, num_rows, block_rows)):
        values[..., first : first + block_rows, :] *= scales_by_column[..., row : row + 1, :]
    return values


def decode_mxfp4(blocks: Codes, scales: Codes) -> Floats:
    """`blocks` `[..., G, 16]`, `scales` `[..., G]`: `[..., 32 * G]`. Raises ValueError where a
    scale is NaN."""
    if (scales == _E8M0_NAN).any():
        raise ValueError("has a scale that is NaN")
    values: Floats = _E2M1_PAIRS[blocks].view(np.float32)
    with np.errstate(over="ignore"):  # 4 and 6 times 2^127 are infinite, as in other readers
        values *= _E8M0[scales][..., np.newaxis]
    return values.reshape(*blocks.shape[:-2], -1)
