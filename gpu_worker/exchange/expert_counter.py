"""How often each expert was chosen, and how much this rank has computed: counted where tokens are
routed, read by whoever asks."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.types import Member
from shared.wire import ExpertCounts, ExpertCountsQuery


class ExpertReading(NamedTuple):
    """`chosen_LE`: pairs of a token of this rank and an expert. `computed_L`: pairs that this
    rank's slots computed, whoever's tokens. Both uint32, modulo 2³², since the incarnation began.
    Steps that were abandoned count too."""

    chosen_LE: NDArray[np.uint32]
    computed_L: NDArray[np.uint32]


class ExpertCounter(Protocol):
    @property
    def spread(self) -> bool:
        """Whether the replicas of an expert share its tokens."""
        ...

    async def read(self) -> ExpertReading: ...


class HostExpertCounter:
    """Implements `ExpertCounter`. The engine thread adds to the fields, another one reads them, so
    that a reading may have half of a step."""

    def __init__(self, num_layers: int, num_experts: int, *, spread: bool) -> None:
        self.chosen_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.computed_L = [0] * num_layers
        self.spread = spread

    async def read(self) -> ExpertReading:
        computed_L = np.array(self.computed_L, dtype=np.int64)
        return ExpertReading(self.chosen_LE.astype(np.uint32), computed_L.astype(np.uint32))


async def count_experts(
    counter: ExpertCounter | None, member: Member, query: ExpertCountsQuery
) -> ExpertCounts:
    """The answer of a rank, whose `counter` is None if nobody counts."""
    reading = None if counter is None else await counter.read()
    return ExpertCounts(
        nonce=query.nonce,
        rank=member.rank,
        incarnation=member.incarnation,
        spread=counter is not None and counter.spread,
        num_experts=0 if reading is None else reading.chosen_LE.shape[1],
        chosen=b"" if reading is None else reading.chosen_LE.astype("<u4").tobytes(),
        computed=b"" if reading is None else reading.computed_L.astype("<u4").tobytes(),
    )
