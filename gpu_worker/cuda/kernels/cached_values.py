"""The formats of values in a KV cache: the model's own, or e4m3 with a scale of 1, which keeps four
significant bits of what lies within ±448. Attention reads nothing but what the cache holds, also of
the tokens of its own step, so that a step gives the same bits however its tokens came there."""

from __future__ import annotations

import triton
import triton.language as tl

_MAX = tl.constexpr(448.0)
_MIN_NORMAL = tl.constexpr(2.0**-6)
_ONTO_SUBNORMALS = tl.constexpr(2.0**14)
"""A float32 of this size has steps of 2⁻⁹, as e4m3 has below its smallest normal value."""
_ONTO_SUBNORMALS_BITS = tl.constexpr((14 + 127) << 23)


@triton.jit
def to_cached(x, dtype: tl.constexpr):
    """`x` in the cache's format. What e4m3 has no room for becomes its largest value; all else is
    rounded to the nearest, or the even one of two. Done by hand, as cards' own conversions differ
    in the former, and Triton's interpreter in the latter."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -_MAX), _MAX)
        whole = x.to(tl.uint32, bitcast=True)
        size = whole & 0x7FFFFFFF
        # Three bits of the mantissa stay; the exponent's bias goes from 127 to 7.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        subnormal = (tl.abs(x) + _ONTO_SUBNORMALS).to(tl.uint32, bitcast=True)
        subnormal -= _ONTO_SUBNORMALS_BITS
        code = tl.where(tl.abs(x) < _MIN_NORMAL, subnormal, normal) | ((whole >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(dtype)
