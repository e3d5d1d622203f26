"""The merge of attention that is computed in splits of a row's positions.

A row's splits are merged in rising order within spans of SPAN splits, and then the spans are
merged in rising order. All merging is element by element, so tiles, threads and the program that
merges do not change a bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gpu_worker.cuda.kernels.arrivals import arrive_and_test_last

SPLITS_MAX = 16
"""The number of splits of a row at most, for kernels whose splits grow with the row's context."""
SPAN = 16


class Partials(NamedTuple):
    """Results of splits, or of spans of splits, X, in float32: unnormalised values, the maximum
    score, and the sum of the weights."""

    values_TQXD: torch.Tensor
    maximum_TQX: torch.Tensor
    sum_TQX: torch.Tensor


class WindowAndSinks(NamedTuple):
    """What attention differs in between families and layers. `window` is the number of positions
    that a row sees, its own included; 0: all. `sinks_Q` (float32) has a score for each query head,
    times log2(e), that takes part in the softmax and has no value."""

    window: int = 0
    sinks_Q: torch.Tensor | None = None

    def form(self) -> dict[str, int | bool]:
        """What kernels are compiled for."""
        return {"WINDOW": self.window, "SINKS": self.sinks_Q is not None}

    def sinks_or(self, unused: torch.Tensor) -> torch.Tensor:
        """What kernels take: without sinks, a tensor that they do not read."""
        return unused if self.sinks_Q is None else self.sinks_Q

    def splits_seen_max(self, splits_max: int, split_tokens: int) -> int:
        """Of one row."""
        if not self.window:
            return splits_max
        return min(splits_max, (self.window - 1) // split_tokens + 2)


SEES_ALL = WindowAndSinks()


def new_partials(
    rows: int, heads: int, parts_max: int, head_dim: int, device: torch.device
) -> Partials:
    """Zeros in float32, for up to `parts_max` results per row and head."""
    shape = (rows, heads, parts_max)
    return Partials(
        torch.zeros(*shape, head_dim, device=device, dtype=torch.float32),
        torch.zeros(*shape, device=device, dtype=torch.float32),
        torch.zeros(*shape, device=device, dtype=torch.float32),
    )


def merge_splits(
    partials: Partials,
    position_T: torch.Tensor,
    out_TC: torch.Tensor,
    *,
    split_tokens: int,
    warps: int,
    doublings: int = 0,
    kind: WindowAndSinks = SEES_ALL,
) -> None:
    """Merges the splits of each row of `position_T` into `out_TC`, heads side by side. The size of
    the splits changes the bits: see `split_size`."""
    _, heads, splits_max, head_dim = partials.values_TQXD.shape
    _merge_splits[(position_T.shape[0], heads)](
        *partials,
        position_T,
        kind.sinks_or(out_TC),
        out_TC,
        splits_max,
        HEADS=heads,
        HEAD_DIM=head_dim,
        SPLIT=split_tokens,
        SPLITS_MAX=SPLITS_MAX,
        DOUBLINGS=doublings,
        SPAN=SPAN,
        **kind.form(),
        num_warps=warps,
    )


def spans_view(partials: Partials, spans_max: int) -> Partials:
    """The same memory for spans of as many rows as fit."""
    rows, heads, splits_max, head_dim = partials.values_TQXD.shape
    shape = (rows * splits_max // spans_max, heads, spans_max)
    places = shape[0] * heads * spans_max
    return Partials(
        partials.values_TQXD.view(-1)[: places * head_dim].view(*shape, head_dim),
        partials.maximum_TQX.view(-1)[:places].view(shape),
        partials.sum_TQX.view(-1)[:places].view(shape),
    )


def merge_spans(
    spans: Partials,
    position_T: torch.Tensor,
    out_TC: torch.Tensor,
    *,
    split_tokens: int,
    kind: WindowAndSinks = SEES_ALL,
) -> None:
    """Merges the spans of each row of `position_T` into `out_TC`, heads side by side, as
    `merge_splits` does. Rows without a token get zeros."""
    _, heads, spans_max, head_dim = spans.values_TQXD.shape
    _merge_spans[(position_T.shape[0], heads)](
        *spans,
        position_T,
        kind.sinks_or(out_TC),
        out_TC,
        spans_max,
        HEADS=heads,
        HEAD_DIM=head_dim,
        SPAN_TOKENS=SPAN * split_tokens,
        SPAN=SPAN,
        **kind.form(),
        num_warps=1,
    )


@triton.jit
def split_size(position, SPLIT: tl.constexpr, SPLITS_MAX: tl.constexpr, DOUBLINGS: tl.constexpr):
    """The size of a row's splits, which depends on its own position alone: SPLIT, doubled until
    there are at most SPLITS_MAX. `DOUBLINGS` must be enough for every position."""
    size = position * 0 + SPLIT
    for _ in tl.static_range(DOUBLINGS):
        size = tl.where(position // size >= SPLITS_MAX, size * 2, size)
    return size


@triton.jit
def first_split_of(position, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """The first split of which a row at this position sees a part. Splits before it count as if
    they were not there; one that a tile computes for the sake of other rows, and this row does not
    see, changes no bit: see `add_partial`."""
    return tl.maximum(position - (WINDOW - 1), 0) // SPLIT


@triton.jit
def with_sink(total, peak, sinks_ptr, head, mask, HEADS: tl.constexpr):
    """The sum of a row's weights with that of its sink. `head` counts over rows."""
    sink = tl.load(sinks_ptr + head % HEADS, mask=mask, other=0.0)
    return total + tl.exp2(sink - peak)


@triton.jit
def store_partials(
    values_ptr, maximum_ptr, sum_ptr, at, values, maximum, sums, mask, HEAD_DIM: tl.constexpr
):
    """Stores one partial result per row at index `at`, for the rows in `mask`."""
    d = tl.arange(0, HEAD_DIM)
    tl.store(values_ptr + at[:, None] * HEAD_DIM + d[None, :], values, mask=mask[:, None])
    tl.store(maximum_ptr + at, maximum, mask=mask)
    tl.store(sum_ptr + at, sums, mask=mask)


@triton.jit
def store_normalised(out_ptr, head, values, total, mask, HEAD_DIM: tl.constexpr):
    """Divides by the sum and stores; a head that has attended to nothing gives zeros."""
    d = tl.arange(0, HEAD_DIM)
    out = values / tl.where(total > 0.0, total, 1.0)[:, None]
    out_ptrs = out_ptr + head[:, None] * HEAD_DIM + d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_partial(peak, total, values, maximum, sums, parts):
    """Adds a partial result to the running one. A `maximum` of -inf leaves it exactly as it is."""
    new_peak = tl.maximum(peak, maximum)
    base = tl.where(new_peak > float("-inf"), new_peak, 0.0)
    keep = tl.exp2(peak - base)
    weight = tl.exp2(maximum - base)
    total = tl.fma(sums, weight, total * keep)
    weights = tl.broadcast_to(weight[:, None], parts.shape)
    values = tl.fma(parts, weights, values * keep[:, None])
    return new_peak, total, values


@triton.jit
def _merged(
    values_ptr,
    maximum_ptr,
    sum_ptr,
    first,
    count,
    is_row,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPAN: tl.constexpr,
):
    """(maximum, sum, unnormalised values) of each row's `count` partial results from index `first`
    on."""
    d = tl.arange(0, HEAD_DIM)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    values = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    for start in range(0, count, SPAN):
        loaded = ()
        for x in tl.static_range(SPAN):
            has = is_row & (start + x < count)
            at = first + start + x
            maximum = tl.load(maximum_ptr + at, mask=has, other=float("-inf"))
            sums = tl.load(sum_ptr + at, mask=has, other=0.0)
            parts_ptr = values_ptr + at[:, None] * HEAD_DIM + d[None, :]
            parts = tl.load(parts_ptr, mask=has[:, None], other=0.0)
            loaded = loaded + (maximum, sums, parts)  # type: ignore[assignment]  # noqa: RUF005
        # All loads come before the first use, or their latencies would add up.
        tl.debug_barrier()
        for x in tl.static_range(SPAN):
            peak, total, values = add_partial(
                peak, total, values, loaded[3 * x], loaded[3 * x + 1], loaded[3 * x + 2]
            )
    return peak, total, values


@triton.jit
def merge_after(
    split,
    begin,
    num_splits,
    kv_row,
    values_ptr,
    maximum_ptr,
    sum_ptr,
    span_values_ptr,
    span_maximum_ptr,
    span_sum_ptr,
    arrivals_ptr,
    sinks_ptr,
    out_ptr,
    splits_max,
    spans_max,
    OWN: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPAN: tl.constexpr,
    HEADS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merges for the OWN query heads of one row and KV head, number `kv_row` of all. Splits begin
    at number `begin`. The last split of a span merges the span of `split`, and the last span merges
    all spans."""
    g = tl.arange(0, GROUP)
    is_head = g < OWN
    head = kv_row * OWN + g
    span = split // SPAN
    begin_span = begin // SPAN
    num_spans = (num_splits + SPAN - 1) // SPAN - begin_span
    start = tl.maximum(span * SPAN, begin)
    count = tl.minimum(num_splits, span * SPAN + SPAN) - start
    arrivals_ptr += kv_row * (spans_max + 1)
    if arrive_and_test_last(arrivals_ptr + 1 + span, count):
        first = head * splits_max + start
        peak, total, values = _merged(
            values_ptr, maximum_ptr, sum_ptr, first, count, is_head, GROUP, HEAD_DIM, SPAN
        )
        is_whole = num_spans == 1
        if num_spans > 1:
            first_span = head * spans_max + begin_span
            out = head * spans_max + span
            store_partials(
                span_values_ptr,
                span_maximum_ptr,
                span_sum_ptr,
                out,
                values,
                peak,
                total,
                is_head,
                HEAD_DIM,
            )
            is_whole = arrive_and_test_last(arrivals_ptr, num_spans)
            if is_whole:
                peak, total, values = _merged(
                    span_values_ptr,
                    span_maximum_ptr,
                    span_sum_ptr,
                    first_span,
                    num_spans,
                    is_head,
                    GROUP,
                    HEAD_DIM,
                    SPAN,
                )
        if is_whole:
            if SINKS:
                total = with_sink(total, peak, sinks_ptr, head, is_head, HEADS)
            store_normalised(out_ptr, head, values, total, is_head[:, None], HEAD_DIM)


@triton.jit(do_not_specialize=["splits_max"])
def _merge_splits(
    values_ptr,
    maximum_ptr,
    sum_ptr,
    position_ptr,
    sinks_ptr,
    out_ptr,
    splits_max,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS_MAX: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    SPAN: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """A window takes splits of one size: DOUBLINGS is 0."""
    row = tl.program_id(0).to(tl.int64)
    head = row * HEADS + tl.program_id(1) + tl.arange(0, 1)
    position = tl.load(position_ptr + row)
    size = split_size(position, SPLIT, SPLITS_MAX, DOUBLINGS)
    num_splits = (position + size) // size
    peak = tl.full([1], float("-inf"), dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    values = tl.zeros([1, HEAD_DIM], dtype=tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = first_split_of(position, SPLIT, WINDOW)
    for span in range(begin // SPAN * SPAN, num_splits, SPAN):
        first = span
        if WINDOW > 0:
            first = tl.maximum(span, begin)
        maximum, sums, parts = _merged(
            values_ptr,
            maximum_ptr,
            sum_ptr,
            head * splits_max + first,
            tl.minimum(num_splits, span + SPAN) - first,
            head >= 0,
            1,
            HEAD_DIM,
            SPAN,
        )
        peak, total, values = add_partial(peak, total, values, maximum, sums, parts)
    if SINKS:
        total = with_sink(total, peak, sinks_ptr, head, head >= 0, HEADS)
    store_normalised(out_ptr, head, values, total, True, HEAD_DIM)


@triton.jit(do_not_specialize=["spans_max"])
def _merge_spans(
    values_ptr,
    maximum_ptr,
    sum_ptr,
    position_ptr,
    sinks_ptr,
    out_ptr,
    spans_max,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPAN_TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = row * HEADS + tl.program_id(1) + tl.arange(0, 1)
    position = tl.load(position_ptr + row)
    num_spans = (position + SPAN_TOKENS) // SPAN_TOKENS
    begin = 0
    if WINDOW > 0:
        begin = first_split_of(position, SPAN_TOKENS, WINDOW)
    peak, total, values = _merged(
        values_ptr,
        maximum_ptr,
        sum_ptr,
        head * spans_max + begin,
        num_spans - begin,
        head >= 0,
        1,
        HEAD_DIM,
        SPAN,
    )
    if SINKS:
        total = with_sink(total, peak, sinks_ptr, head, head >= 0, HEADS)
    store_normalised(out_ptr, head, values, total, True, HEAD_DIM)
