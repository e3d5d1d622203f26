"""What both kinds of attention do for each token: find its row of the paged cache, and rotate."""

from __future__ import annotations

from typing import Any

from gpu_worker.cpu.kernels.arithmetic import kernel


@kernel
def cache_row(t: int, position_T: Any, sequence_T: Any, table_SB: Any, block_tokens: int) -> Any:
    """The block that token `t` is stored in, and its row within that block."""
    position = position_T[t]
    block = table_SB[sequence_T[t], position // block_tokens]
    return block, position % block_tokens


@kernel
def rotate(x: Any, cos: Any, sin: Any, interleaved: bool, out: Any) -> None:
    """Rotates the first `2 * len(cos)` elements of `x` and leaves the others of `out` alone.
    `interleaved`: a pair is two neighbours; else one element of each half. `out` holds its pairs in
    halves either way. `out` may be `x`, unless the pairs are interleaved."""
    half = cos.shape[0]
    for i in range(half):
        low = x[2 * i] if interleaved else x[i]
        high = x[2 * i + 1] if interleaved else x[i + half]
        out[i] = low * cos[i] - high * sin[i]
        out[i + half] = high * cos[i] + low * sin[i]
