"""Which experts tokens prefer in a simulated instance: skewed, and from time to time others. What
ranks tell of it is made up, because the few tokens of a schedule would be no load."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.expert_counter import ExpertReading
from shared.clock import Clock

PAIRS_A_SECOND = 5000.0


class SimLoads:
    """The same for all ranks at one moment. `num_changes` counts the loads so far."""

    def __init__(self, clock: Clock, seed: int, num_layers: int, num_experts: int) -> None:
        self.num_changes = 0
        self._clock = clock
        self._rng = random.Random(seed * 7919 + 3)
        self._shape = (num_layers, num_experts)
        self._shares: NDArray[np.float64] = np.zeros(self._shape)
        self._until = -1.0

    def shares(self) -> NDArray[np.float64]:
        """`[L, E]`: of a layer's pairs."""
        now = self._clock.now()
        if now >= self._until:
            self._until = now + self._rng.choice([0.3, 3.0, 8.0])
            self.num_changes += 1
            rng = np.random.default_rng(self._rng.randrange(1 << 32))
            ranks = 1.0 / np.arange(1, self._shape[1] + 1) ** self._rng.choice([0.0, 0.5, 1.0, 1.5])
            self._shares = np.stack([rng.permutation(ranks) for _ in range(self._shape[0])])
            self._shares /= ranks.sum()
        return self._shares


class SimExpertCounter:
    """Implements `ExpertCounter` for one incarnation."""

    spread = True

    def __init__(self, loads: SimLoads, clock: Clock) -> None:
        self._loads = loads
        self._clock = clock
        self._read_at = clock.now()
        self._chosen_LE: NDArray[np.float64] = np.zeros(())

    async def read(self) -> ExpertReading:
        now = self._clock.now()
        new_pairs = self._loads.shares() * PAIRS_A_SECOND * (now - self._read_at)
        self._chosen_LE, self._read_at = self._chosen_LE + new_pairs, now
        chosen_LE = self._chosen_LE.astype(np.uint32)
        return ExpertReading(chosen_LE, chosen_LE.sum(axis=1, dtype=np.uint32))
