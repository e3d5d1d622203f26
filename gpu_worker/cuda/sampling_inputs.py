"""Decides which rows of a step the device samples, and how. The logits of the others go to the
host. The decision for a row depends on its own session alone, so that a continuation draws the
same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpu_worker.engine.draw import Draw
from gpu_worker.engine.sampler import uniform

BANNED_MAX = 4


class RowDraw(NamedTuple):
    """How the device samples one wanted row. `uniform`, in [0, 1), is derived from (seed,
    position). At most BANNED_MAX ids are banned."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    uniform: float = 0.0
    banned: tuple[int, ...] = ()


def needs_logits(draw: Draw) -> bool:
    """Whether the host must see the row's logits."""
    sampling = draw.sampling
    return (
        draw.counts is not None
        or draw.allowed is not None
        or len(draw.banned) > BANNED_MAX
        or draw.bias is not None
        or sampling.min_p > 0.0
        or sampling.logprobs is not None
    )


def row_draws(draws: Sequence[Draw]) -> list[RowDraw]:
    """One draw per row. For rows whose logits the host needs it is greedy, and its token is
    unused."""
    return [RowDraw() if needs_logits(draw) else _row_draw(draw) for draw in draws]


def _row_draw(draw: Draw) -> RowDraw:
    sampling = draw.sampling
    return RowDraw(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        uniform=uniform(sampling.seed, draw.position),
        banned=draw.banned,
    )
