"""Matrix products in vector registers, and the layout of the weights that they read: panels of 32
columns, `[panels, inputs, 32]`, with zeros after the last column.

A tile is a few rows by a few vectors of columns. Its sums stay in registers over all inputs. Each
lane is one output element and computes the chain that `arithmetic` describes, so the shape of the
tile changes no bit. Vectors have 16 lanes; the compiler splits them on machines with shorter ones.

Weights that are stored as bfloat16 stay bfloat16 in memory and are widened in registers. That is
exact: the low half of the float32 is zero. Columns c and c + 16 of a panel share a 32-bit word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as typed_cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16
PANEL = 2 * LANES
ROWS_MAX = 8
ROWS_MAX_WIDE = 6
"""Rows of a tile that is two vectors wide, and of one that is four wide: 16 and 24 of 32 registers,
which are enough independent chains to keep the multipliers busy."""

_PREFETCH_BYTES = 4096
_PREFETCHED_ROWS_MIN = 5
"""The processor predicts the reads of a panel by itself. A software prefetch helps only if a tile
computes for about as long as its weights take to arrive, which takes this many rows."""

_LINE_BYTES = 64

cgutils: Any = typed_cgutils
_INT, _WORD = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_INT, LANES)


def pack(w_KN: NDArray[Any], out: NDArray[Any], first: int = 0) -> None:
    """Writes `w_KN` (float32, or bfloat16 as uint16) to the panels `out`, from column `first` on.
    Elements of `out` without a column stay as they are: zeros."""
    end = first + w_KN.shape[1]
    for panel in range(first // PANEL, -(-end // PANEL)):
        start = panel * PANEL
        low, high = max(first - start, 0), min(end - start, PANEL)
        columns = w_KN[:, start + low - first : start + high - first]
        if w_KN.dtype == np.uint16:
            middle = min(max(low, LANES), high)
            out[panel, :, 2 * low : 2 * middle : 2] = columns[:, : middle - low]
            odd = slice(2 * (middle - LANES) + 1, 2 * (high - LANES) + 1, 2)
            out[panel, :, odd] = columns[:, middle - low :]
        else:
            out[panel, :, low:high] = columns


def _accumulate_tile(
    typing_context: Any, rows: Any, vectors: Any, x: Any, m: Any, k: Any, w: Any, at: Any,
    start: Any, depth: Any, out: Any, n: Any,
) -> Any:  # fmt: skip
    """out[m : m + rows, n …] += x[m : m + rows, k : k + depth] @ w, for 1 to ROWS_MAX rows.

    The columns of w are, side by side for each index in the tuple `at`, `depth` rows of w[index]
    from its element `start` on, `vectors` vectors wide (a literal; 2 if w is bfloat16)."""
    intp = types.intp
    signature = types.void(intp, vectors, x, intp, intp, w, at, intp, intp, out, intp)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        assert all(kinds[i].layout == "C" for i in (2, 5, 9))
        x, w, out = (context.make_array(kinds[i])(context, builder, args[i]) for i in (2, 5, 9))
        starts = _starts(builder, w, cgutils.unpack_tuple(builder, args[6]), args[7])
        load = _load_wide if kinds[5].dtype == types.float32 else _load_narrow
        weights = _Weights(starts, cgutils.unpack_tuple(builder, w.shape)[2], load)
        with _one_case_for_each(builder, args[0], ROWS_MAX) as cases:
            for num_rows, case in enumerate(cases, start=1):
                with case:
                    x_rows = _row_pointers(builder, x, args[3], num_rows, args[4])
                    out_rows = _row_pointers(builder, out, args[3], num_rows, args[10])
                    num_vectors = kinds[1].literal_value
                    _accumulate_rows(builder, x_rows, weights, num_vectors, args[8], out_rows)
        return context.get_dummy_value()

    return signature, build


accumulate_tile: Any = intrinsic(prefer_literal=True)(_accumulate_tile)


class _Weights(NamedTuple):
    """Pointers to the first row of each part, and the number of elements from a row to the
    next."""

    starts: list[Any]
    stride: Any
    load: Callable[[Any, Any, int], list[Any]]


@contextmanager
def _one_case_for_each(builder: Any, value: Any, count: int) -> Iterator[list[Any]]:
    """A switch over the values 1, 2 … count: the code of each case is built inside its context."""
    end = builder.append_basic_block("end")
    blocks = [builder.append_basic_block("rows") for _ in range(count)]
    switch = builder.switch(value, blocks[-1])
    for number, block in enumerate(blocks[:-1], start=1):
        switch.add_case(_WORD(number), block)

    @contextmanager
    def inside(block: Any) -> Iterator[None]:
        builder.position_at_end(block)
        yield
        builder.branch(end)

    yield [inside(block) for block in blocks]
    builder.position_at_end(end)


def _accumulate_rows(
    builder: Any,
    x_rows: list[Any],
    weights: _Weights,
    vectors: int,
    depth: Any,
    out_rows: list[Any],
) -> None:
    """LLVM promotes the memory of the sums to registers."""
    count = vectors * len(weights.starts)
    places = [_vector_pointers(builder, row, count) for row in out_rows]
    sums = [
        [cgutils.alloca_once_value(builder, builder.load(v, align=4)) for v in row]
        for row in places
    ]
    with cgutils.for_range(builder, depth) as loop:
        offset = builder.mul(loop.index, weights.stride)
        row_of_w: list[Any] = []
        for start in weights.starts:
            pointer = builder.gep(start, [offset])
            row_of_w += weights.load(builder, pointer, vectors)
            if len(x_rows) >= _PREFETCHED_ROWS_MIN:
                _prefetch(builder, pointer, vectors)
        for x_row, row_sums in zip(x_rows, sums, strict=True):
            value = _splat(builder, builder.load(builder.gep(x_row, [loop.index])))
            for weight, total in zip(row_of_w, row_sums, strict=True):
                builder.store(_fma(builder, value, weight, builder.load(total)), total)
    for row_places, row_sums in zip(places, sums, strict=True):
        for place, total in zip(row_places, row_sums, strict=True):
            builder.store(builder.load(total), place, align=4)


def _row_pointers(builder: Any, array: Any, first: Any, count: int, column: Any) -> list[Any]:
    """Pointers to `column` of `count` rows from `first` on."""
    width = cgutils.unpack_tuple(builder, array.shape)[1]
    rows = [builder.add(first, _WORD(r)) for r in range(count)]
    return [builder.gep(array.data, [builder.add(builder.mul(row, width), column)]) for row in rows]


def _starts(builder: Any, w: Any, indices: list[Any], start: Any) -> list[Any]:
    _, depth, width = cgutils.unpack_tuple(builder, w.shape)
    size = builder.mul(depth, width)
    return [builder.gep(w.data, [builder.add(builder.mul(i, size), start)]) for i in indices]


def _vector_pointers(builder: Any, pointer: Any, count: int) -> list[Any]:
    first = builder.bitcast(pointer, _FLOATS.as_pointer())
    return [builder.gep(first, [_WORD(v)]) for v in range(count)]


def _load_wide(builder: Any, pointer: Any, vectors: int) -> list[Any]:
    return [builder.load(v, align=4) for v in _vector_pointers(builder, pointer, vectors)]


def _load_narrow(builder: Any, pointer: Any, vectors: int) -> list[Any]:
    """The two vectors of a row of a panel of bfloat16."""
    assert vectors == 2
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


def _prefetch(builder: Any, pointer: Any, vectors: int) -> None:
    """Prefetches cache lines of a later row: a vector of float32 fills a line, a vector of bfloat16
    half a line."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    to_read, to_all_caches, data = _INT(0), _INT(3), _INT(1)
    is_wide = pointer.type == ir.FloatType().as_pointer()
    for line in range(vectors if is_wide else vectors // 2):
        offset = _WORD(_PREFETCH_BYTES + _LINE_BYTES * line)
        target = builder.gep(builder.bitcast(pointer, byte), [offset])
        builder.call(function, [target, to_read, to_all_caches, data])
