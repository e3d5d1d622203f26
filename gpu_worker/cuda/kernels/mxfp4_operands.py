"""How the kernels widen weights in MXFP4: in registers, to what the codes stand for, which bfloat16
holds exactly."""

from __future__ import annotations

import triton
import triton.language as tl

_WIDEN_PAIR = """
and.b32 pair, {word}, {mask};
mul.lo.u32 pair, pair, {places};
and.b32 pair, pair, 0x81C081C0;
fma.rn.bf16x2 pair, pair, unit, nothing;
fma.rn.bf16x2 pair, pair, $9, nothing;
mov.b32 {{${low}, ${high}}}, pair;"""
_PAIRS = (  # in the order of bits
    {"word": "$8", "mask": "0x000F000F", "places": "0x1040"},
    {"word": "$8", "mask": "0x00F000F0", "places": "0x104"},
    {"word": "second", "mask": "0x000F000F", "places": "0x1040"},
    {"word": "second", "mask": "0x00F000F0", "places": "0x104"},
)
_WIDEN_WORD = tl.constexpr(
    "{\n.reg .b32 second, pair, unit, nothing;\nshr.u32 second, $8, 8;\n"
    "mov.b32 unit, 0x7E807E80;\nmov.b32 nothing, 0x80008000;"
    + "".join(
        _WIDEN_PAIR.format(**pair, low=2 * place, high=2 * place + 1)
        for place, pair in enumerate(_PAIRS)
    )
    + "\n}"
)
"""A word's eight codes to bfloat16, two at a time. A code's bits, put where bfloat16 has its sign,
two of its exponent and one of its mantissa, are the value times 2⁻¹²⁶, subnormal ones included; a
product with 2¹²⁶ (`unit`) and one with the group's scale make it whole. One product of integers
puts a code to both places, sign and rest. The summand is -0, which changes no product."""
_UNIT = tl.constexpr(2.0**126)


@triton.jit
def widen_words(words, scales, x, BY_CARD: tl.constexpr):
    """`[C, W]` words of codes and `[C, W / 16]` words of scales to `[C, 8 W]` in the type of `x`:
    see `Mxfp4Matrix`."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    first = tl.join(_factor(scales, 0, BY_CARD), _factor(scales, 8, BY_CARD))
    second = tl.join(_factor(scales, 16, BY_CARD), _factor(scales, 24, BY_CARD))
    factor = tl.permute(tl.join(first, second), [0, 1, 3, 2])
    factor = tl.broadcast_to(factor[:, :, :, :, None], [ROWS, WORDS // 16, 2, 2, 4])
    factor = tl.reshape(factor, [ROWS, WORDS])
    if BY_CARD:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            _WIDEN_WORD, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, factor],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        a = tl.join(a0, a1).to(tl.bfloat16, bitcast=True)
        b = tl.join(b0, b1).to(tl.bfloat16, bitcast=True)
        c = tl.join(c0, c1).to(tl.bfloat16, bitcast=True)
        d = tl.join(d0, d1).to(tl.bfloat16, bitcast=True)
    else:
        factor = factor.to(tl.float32, bitcast=True)
        a = tl.join(_value(words, factor, 0), _value(words, factor, 16)).to(x.dtype)
        b = tl.join(_value(words, factor, 4), _value(words, factor, 20)).to(x.dtype)
        c = tl.join(_value(words, factor, 8), _value(words, factor, 24)).to(x.dtype)
        d = tl.join(_value(words, factor, 12), _value(words, factor, 28)).to(x.dtype)
    wide = tl.join(tl.join(a, c), tl.join(b, d))  # [C, W, e, h, s]
    wide = tl.reshape(wide, [ROWS, WORDS // 4, 4, 2, 2, 2])
    return tl.reshape(tl.permute(wide, [0, 1, 5, 4, 2, 3]), [ROWS, 8 * WORDS])


@triton.jit
def _factor(scales, SHIFT: tl.constexpr, BY_CARD: tl.constexpr):
    """The bits of the scale at SHIFT: as float32, or for the card twice as bfloat16."""
    scale = (scales >> SHIFT) & 255
    # 2**-127 is subnormal, and has no exponent.
    twice = tl.maximum(scale << 7, 0x40) * 0x10001
    return twice if BY_CARD else tl.maximum(scale << 23, 0x400000)


@triton.jit
def _value(words, factor, SHIFT: tl.constexpr):
    """Of the codes at SHIFT, as the card's instructions find it, in float32."""
    code = words >> SHIFT
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * _UNIT * factor
