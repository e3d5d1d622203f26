"""The interface between a rank's forward and its peers: `dispatch → experts → combine`, the only
place where ranks talk in a forward.

Shape letters: T tokens of this rank in the step, K top-k, H hidden size, M distinct token rows that
this rank's experts need (its own and its peers'), N (row, slot) pairs to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.expert_map import ExpertMap
from shared.types import Epoch, RankId, Step, SuspicionReason


class Dispatched(NamedTuple):
    """What this rank's experts must compute in one layer of one step."""

    x_MH: NDArray[np.float32]
    rows_N: NDArray[np.int32]  # index into x_MH
    slots_N: NDArray[np.int32]  # local slot of the layer
    any_tokens: bool  # some member has tokens in this step; the same answer on every rank
    any_work: bool  # some member had work when it began this step; the same answer on every rank
    all_know_next: bool = False  # all knew of a later map then; likewise


class StepMonitor(Protocol):
    """How an exchange communicates with the rest of its rank while it waits. Called often, on the
    engine thread: every call must be cheap."""

    def newest_epoch(self) -> Epoch:
        """The epoch of the newest map that reached this rank."""
        ...

    def beat(self, waiting_for: Sequence[RankId]) -> None:
        """The engine thread is alive and waits for these peers; empty if it waits for none."""
        ...

    def suspect(self, rank: RankId, reason: SuspicionReason, detail: str) -> None:
        """Raises one suspicion. The exchange calls it at most once for each peer, reason and
        step."""
        ...


class Exchange(Protocol):
    """One rank's end. All methods run on the engine thread.

    Each step calls `begin_step`, then `dispatch` and `combine` for every MoE layer in order. Both
    raise StepAbandoned as soon as `StepMonitor.newest_epoch()` exceeds the step's epoch, or a
    peer's message shows a later epoch. The caller then discards the step, waits for the map, adopts
    it and begins again.
    """

    def adopt(self, expert_map: ExpertMap) -> None:
        """Uses this map from the next `begin_step` on. The rank itself must be a member, and every
        member's link must be open."""
        ...

    def begin_step(
        self, epoch: Epoch, step: Step, *, num_tokens: int, has_work: bool, knows_next: bool = False
    ) -> None:
        """Sets what the step's dispatch messages will say. `knows_next`: a later map is here, which
        all are to adopt after the same step. No I/O."""
        ...

    @property
    def may_change_map(self) -> bool:
        """Whether, after the step that was committed last, the first messages under another map
        leave those alone that a slower peer may still have to read. The same on every rank; if not,
        it is so after a step without tokens."""
        ...

    def dispatch(
        self, layer: int, x_TH: NDArray[np.float32], experts_TK: NDArray[np.int32]
    ) -> Dispatched:
        """Sends each token to the ranks whose slots hold its experts (one replica each), and
        returns what arrived for this rank. `layer` counts MoE layers. Rows of the result are
        ordered by member rank, then by that rank's token; pairs by row, then by k."""
        ...

    def combine(self, layer: int, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        """`y_NH[n]` is the output of pair n of the matching `dispatch`. Returns `y_TKH`, float32:
        for each token of this rank the output of its k-th expert, unweighted. Valid until the next
        `combine`."""
        ...
