"""The exchange of a rank that holds every expert, expert e in slot e. Nothing is sent or copied."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.interface import Dispatched
from shared.expert_map import ExpertMap
from shared.types import Epoch, Step


class SingleRankExchange:
    """Implements `interface.Exchange` without peers, and therefore without epochs."""

    def __init__(self) -> None:
        self._has_work = self._knows_next = False
        self._shape_TK = (0, 0)
        self._rows_N: NDArray[np.int32] = np.empty(0, dtype=np.int32)

    def adopt(self, expert_map: ExpertMap) -> None:
        experts_E = np.arange(expert_map.num_experts)
        is_whole = expert_map.num_ranks == 1 and (expert_map.placement == experts_E).all()
        assert is_whole, "the map is not that of a rank that holds every expert"

    def begin_step(
        self, epoch: Epoch, step: Step, *, num_tokens: int, has_work: bool, knows_next: bool = False
    ) -> None:
        self._has_work, self._knows_next = has_work, knows_next

    @property
    def may_change_map(self) -> bool:
        return True

    def dispatch(
        self, layer: int, x_TH: NDArray[np.float32], experts_TK: NDArray[np.int32]
    ) -> Dispatched:
        num_tokens, top_k = experts_TK.shape
        if (num_tokens, top_k) != self._shape_TK:
            self._shape_TK = (num_tokens, top_k)
            self._rows_N = np.repeat(np.arange(num_tokens, dtype=np.int32), top_k)
        return Dispatched(
            x_MH=x_TH,
            rows_N=self._rows_N,
            slots_N=experts_TK.reshape(-1),
            any_tokens=num_tokens > 0,
            any_work=self._has_work,
            all_know_next=self._knows_next,
        )

    def combine(self, layer: int, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        return y_NH.reshape(*self._shape_TK, y_NH.shape[1])
