"""How much work each expert is and each rank has, from what ranks have counted: sums in which what
is older counts less. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from control_plane.placement.topology import Floats
from shared.errors import WireError
from shared.types import Member
from shared.wire import ExpertCounts

PAIRS_MIN = 32.0
"""So many pairs of a token and an expert, for each expert on average, must have been seen lately
before loads are believed: with few, they are noise."""


class LoadMeter:
    """Weighs a pair that was counted `t` seconds ago by exp(-t / `time_constant_s`). Ranks count
    from the beginning of their incarnation, so that a new leader begins with their history: it
    weighs no more than what is needed to be believed."""

    def __init__(self, num_layers: int, num_experts: int, *, time_constant_s: float) -> None:
        self._shape = (num_layers, num_experts)
        self._time_constant_s = time_constant_s
        self._chosen: dict[Member, NDArray[np.uint32]] = {}  # as last reported
        self._computed: dict[Member, NDArray[np.uint32]] = {}
        self._loads = _Fading(self._shape)
        self._rank_loads: dict[Member, _Fading] = {}
        self._spread: dict[Member, bool] = {}

    @property
    def is_spread(self) -> bool:
        """Whether all ranks let replicas share an expert's tokens, as the planner assumes."""
        return bool(self._spread) and all(self._spread.values())

    def on_counts(self, member: Member, counts: ExpertCounts, now: float) -> None:
        """Raises WireError if they are not of this model."""
        num_layers, num_experts = self._shape
        if not counts.chosen and not counts.computed:  # nobody counts there
            return
        if len(counts.chosen) != 4 * num_layers * num_experts or counts.num_experts != num_experts:
            raise WireError(f"rank {member} counts other experts than this instance has")
        if len(counts.computed) != 4 * num_layers:
            raise WireError(f"rank {member} counts other layers than this instance has")
        chosen = np.frombuffer(counts.chosen, dtype="<u4").reshape(self._shape)
        computed = np.frombuffer(counts.computed, dtype="<u4")
        is_first = member not in self._chosen
        new_pairs = chosen - self._chosen.get(member, np.uint32(0))  # modulo 2³², as they count
        new_rows = computed - self._computed.get(member, np.uint32(0))
        self._chosen[member], self._computed[member] = chosen, computed
        self._spread[member] = counts.spread
        scale = self._scale_of_history(new_pairs) if is_first else 1.0
        self._loads.add(new_pairs.astype(np.float64) * scale, now, self._time_constant_s)
        of_rank = self._rank_loads.setdefault(member, _Fading((num_layers,)))
        if not is_first:  # histories of ranks are not of the same time
            of_rank.add(new_rows.astype(np.float64), now, self._time_constant_s)

    def keep_only(self, members: frozenset[Member]) -> None:
        for member in [m for m in self._chosen if m not in members]:
            for known in (self._chosen, self._computed, self._rank_loads, self._spread):
                del known[member]

    def loads(self, now: float) -> Floats | None:
        """`[num_layers, num_experts]` float64: the pairs seen lately. None if they are too few."""
        loads = self._loads.at(now, self._time_constant_s)
        enough = PAIRS_MIN * self._shape[1]
        return loads if loads.size and loads.sum(axis=1).min() >= enough else None

    def rank_loads(self, now: float) -> dict[Member, Floats]:
        """`[num_layers]` float64 for each member that has reported: the pairs that it computed
        lately."""
        return {m: load.at(now, self._time_constant_s) for m, load in self._rank_loads.items()}

    def _scale_of_history(self, pairs: NDArray[np.uint32]) -> float:
        most = float(pairs.sum(axis=1, dtype=np.float64).max(initial=0.0))
        return min(1.0, 2 * PAIRS_MIN * self._shape[1] / max(most, 1.0))


class _Fading:
    """A sum whose summands fade with time."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sum: Floats = np.zeros(shape)
        self._at = 0.0

    def add(self, values: Floats, now: float, time_constant_s: float) -> None:
        self._sum = self.at(now, time_constant_s) + values
        self._at = max(self._at, now)

    def at(self, now: float, time_constant_s: float) -> Floats:
        return self._sum * math.exp(-max(0.0, now - self._at) / time_constant_s)
