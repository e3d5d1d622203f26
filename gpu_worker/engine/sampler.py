"""Turns logits into tokens: greedy, or a draw keyed by (seed, position). A row's token depends on
that row alone, so a session continues on another rank exactly as it would have here.

V is the vocabulary, R the rows to sample, C the candidates that survive top-k, min-p and top-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.draw import Draw, edited_logits

NO_TOKEN = -1
"""In place of an id: the row has no finite maximum, so there is nothing to choose from."""

_GREEDY_BELOW = 1e-5  # a colder softmax is greedy in all but rounding
_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments: output `position` of the
    SplitMix64 generator whose state starts at the mixed seed."""
    mixed = _mix64((_mix64((seed + _GOLDEN64) & _MASK64) + (position + 1) * _GOLDEN64) & _MASK64)
    return float(mixed >> 11) * 2.0**-53


def sample(logits_RV: NDArray[np.float32], draws: Sequence[Draw]) -> list[int]:
    """One token id for each draw, from the row of the same number, or NO_TOKEN."""
    if not draws:
        return []
    logits_RV = logits_RV[: len(draws)]
    best_R = logits_RV.argmax(axis=1)  # the first of equals: the lowest id
    finite_R = np.isfinite(logits_RV[np.arange(len(draws)), best_R]).tolist()
    ids: list[int] = best_R.tolist()
    for row, draw in enumerate(draws):
        if not finite_R[row]:
            ids[row] = NO_TOKEN
        elif draw.sampling.temperature >= _GREEDY_BELOW or draw.changes_logits:
            ids[row] = _sample_row(logits_RV[row], draw)
    return ids


def nucleus(weights_C: NDArray[np.float64], p: float) -> NDArray[np.intp]:
    """Indices, rising, of the fewest largest weights whose share reaches p; at least one."""
    p = max(p, 0.0)
    total = weights_C.sum()
    # What is below this sums to less than (1 - p) of the total, so it need not be sorted.
    large = weights_C[weights_C >= (1 - p) * total / len(weights_C)]
    falling = np.sort(large)[::-1]
    reached = int(np.searchsorted(np.cumsum(falling), p * total, side="left"))
    count = min(reached + 1, len(falling))
    return _at_least(weights_C, falling[count - 1], count)


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _sample_row(logits_V: NDArray[np.float32], draw: Draw) -> int:
    # In float64, and one row at a time: if rows were vectorised together, the rounding of an
    # element might depend on its place in a SIMD register.
    x_V = edited_logits(logits_V, draw)
    peak = x_V.max()
    if not np.isfinite(peak):
        return NO_TOKEN
    sampling = draw.sampling
    if sampling.temperature < _GREEDY_BELOW:
        return int(x_V.argmax())
    x_V -= peak
    x_V /= sampling.temperature
    ids_C = largest(x_V, sampling.top_k)
    weights_C = np.exp(x_V if ids_C is None else x_V[ids_C])
    if sampling.min_p > 0.0:  # the likeliest has weight 1
        kept = np.flatnonzero(weights_C >= min(sampling.min_p, 1.0))
        ids_C = kept if ids_C is None else ids_C[kept]
        weights_C = weights_C[kept]
    if sampling.top_p < 1.0:
        kept = nucleus(weights_C, sampling.top_p)
        ids_C = kept if ids_C is None else ids_C[kept]
        weights_C = weights_C[kept]
    choice = _invert_cdf(weights_C, uniform(sampling.seed, draw.position))
    return choice if ids_C is None else int(ids_C[choice])


def largest(x_V: NDArray[np.float64], k: int) -> NDArray[np.intp] | None:
    """The ids of the k largest, rising; of equals at the edge the lowest ids. None: all."""
    if not 0 < k < len(x_V):
        return None
    return _at_least(x_V, np.partition(x_V, len(x_V) - k)[len(x_V) - k], k)


def _at_least(values: NDArray[np.float64], edge: float, count: int) -> NDArray[np.intp]:
    """The indices of the `count` largest, rising, of which `edge` is the least."""
    above = np.flatnonzero(values > edge)
    return np.sort(np.concatenate([above, np.flatnonzero(values == edge)[: count - len(above)]]))


def _invert_cdf(weights_C: NDArray[np.float64], u: float) -> int:
    cdf_C = np.cumsum(weights_C)
    choice = int(np.searchsorted(cdf_C, u * cdf_C[-1], side="right"))
    # u * total may round up to the total itself: then the last candidate that has any weight.
    return choice if choice < len(cdf_C) else int(np.searchsorted(cdf_C, cdf_C[-1], side="left"))
