"""Matrix products in vector registers, and the layout of weights that they stream: panels of 32
columns, `[panels, inputs, 32]`, zeros behind the last column.

A tile is a few rows by one or two panels. Its sums stay in registers over all inputs, one lane an
output element: every lane is the chain of `arithmetic`, so the tile's shape changes no bit. Vectors
are spelt with 16 lanes, and the compiler splits them where the machine's are shorter.

Weights stored as bfloat16 stay so, and are widened in registers (exactly: the low half of a float32
is zero): columns c and c + 16 of a panel lie side by side, in one 32-bit word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as typed_cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16
PANEL = 2 * LANES
ROWS_MAX = 6
"""Of a tile: 6 rows x 2 panels are 24 of 32 registers."""

_PREFETCH_BYTES = 2048
"""Ahead in each panel: a panel is one stream from memory."""

cgutils: Any = typed_cgutils
_INT, _WORD = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_INT, LANES)


def pack(w_KN: NDArray[Any], out: NDArray[Any]) -> None:
    """Float32, or bfloat16 as uint16, into panels that are zeros where w has no column."""
    for panel, first in enumerate(range(0, w_KN.shape[1], PANEL)):
        columns = w_KN[:, first : first + PANEL]
        size = columns.shape[1]
        if w_KN.dtype == np.uint16:
            out[panel, :, 0 : 2 * min(size, LANES) : 2] = columns[:, :LANES]
            out[panel, :, 1 : 2 * max(size - LANES, 0) : 2] = columns[:, LANES:]
        else:
            out[panel, :, :size] = columns


def _advance_tile(
    typing_context: Any, rows: Any, panels: Any, x: Any, m: Any, w: Any, p: Any, out: Any, n: Any
) -> Any:
    """out[m : m + rows, n : n + 32 * panels] += x[m : m + rows] @ panels p … of w. `rows` and
    `panels` are literals; rows of `x` are as long as panels are deep."""
    intp = types.intp
    signature = types.void(rows, panels, x, intp, w, intp, out, intp)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        num_rows, num_panels = kinds[0].literal_value, kinds[1].literal_value
        x, w, out = (context.make_array(kinds[i])(context, builder, args[i]) for i in (2, 4, 6))
        depth = cgutils.unpack_tuple(builder, w.shape)[1]
        x_rows = _row_pointers(builder, x, args[3], num_rows, _WORD(0))
        out_rows = _row_pointers(builder, out, args[3], num_rows, args[7])
        panels = _panel_pointers(builder, w, args[5], num_panels, depth)
        places = [_vector_pointers(builder, row, 2 * num_panels) for row in out_rows]
        sums = [
            [cgutils.alloca_once_value(builder, builder.load(v, align=4)) for v in row]
            for row in places
        ]
        load = _load_wide if kinds[4].dtype == types.float32 else _load_narrow
        with cgutils.for_range(builder, depth) as loop:
            _advance_by_one(builder, loop.index, x_rows, panels, load, sums)
        for row_places, row_sums in zip(places, sums, strict=True):
            for place, total in zip(row_places, row_sums, strict=True):
                builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return signature, build


advance_tile: Any = intrinsic(prefer_literal=True)(_advance_tile)


def _advance_by_one(
    builder: Any, k: Any, x_rows: list[Any], panels: list[Any], load: Any, sums: list[list[Any]]
) -> None:
    """One term of every chain. The sums' memory becomes registers."""
    weights = []
    for panel in panels:
        weights += load(builder, builder.gep(panel, [builder.mul(k, _WORD(PANEL))]))
    for x_row, row_sums in zip(x_rows, sums, strict=True):
        value = _splat(builder, builder.load(builder.gep(x_row, [k])))
        for weight, total in zip(weights, row_sums, strict=True):
            builder.store(_fma(builder, value, weight, builder.load(total)), total)


def _row_pointers(builder: Any, array: Any, first: Any, count: int, column: Any) -> list[Any]:
    """To `column` of rows `first` …"""
    width = cgutils.unpack_tuple(builder, array.shape)[1]
    rows = [builder.add(first, _WORD(r)) for r in range(count)]
    return [builder.gep(array.data, [builder.add(builder.mul(row, width), column)]) for row in rows]


def _panel_pointers(builder: Any, w: Any, first: Any, count: int, depth: Any) -> list[Any]:
    size = builder.mul(depth, _WORD(PANEL))
    panels = [builder.add(first, _WORD(i)) for i in range(count)]
    return [builder.gep(w.data, [builder.mul(panel, size)]) for panel in panels]


def _vector_pointers(builder: Any, pointer: Any, count: int) -> list[Any]:
    first = builder.bitcast(pointer, _FLOATS.as_pointer())
    return [builder.gep(first, [_WORD(v)]) for v in range(count)]


def _load_wide(builder: Any, pointer: Any) -> list[Any]:
    """The two vectors of a row of a panel of float32."""
    for line in range(2):
        _prefetch(builder, pointer, _PREFETCH_BYTES + 64 * line)
    return [builder.load(v, align=4) for v in _vector_pointers(builder, pointer, 2)]


def _load_narrow(builder: Any, pointer: Any) -> list[Any]:
    """The two vectors of a row of a panel of bfloat16."""
    _prefetch(builder, pointer, _PREFETCH_BYTES)
    pairs = builder.load(builder.bitcast(pointer, _INTS.as_pointer()), align=2)
    low = builder.shl(pairs, ir.Constant(_INTS, [16] * LANES))
    high = builder.and_(pairs, ir.Constant(_INTS, [0xFFFF0000] * LANES))
    return [builder.bitcast(half, _FLOATS) for half in (low, high)]


def _splat(builder: Any, scalar: Any) -> Any:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, scalar, _INT(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_INTS, [0] * LANES))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [a, b, c])


def _prefetch(builder: Any, pointer: Any, ahead_bytes: int) -> None:
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    target = builder.gep(builder.bitcast(pointer, byte), [_WORD(ahead_bytes)])
    to_read, to_all_caches, data = _INT(0), _INT(3), _INT(1)
    builder.call(function, [target, to_read, to_all_caches, data])
