"""An exchange between ranks that are threads of one process: a simple implementation of the
interface. Tests use it in place of the network, and as the reference for the implementation over
the network."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.interface import Dispatched, StepMonitor
from gpu_worker.exchange.message import ExchangePhase, message_buffer_index
from gpu_worker.exchange.replica_policy import ReplicaChoice, choose_replicas
from gpu_worker.exchange.wait_policy import WaitPolicy
from shared.clock import Clock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, RankId, Step

_PARK_S = 0.001


class _Place(NamedTuple):
    """The exchange that a message belongs to. Ordered by epoch first. `ordinal` counts the
    exchanges of the epoch."""

    epoch: Epoch
    step: Step
    layer: int
    is_combine: bool
    ordinal: int

    @property
    def buffer(self) -> int:
        phase = ExchangePhase.COMBINE if self.is_combine else ExchangePhase.DISPATCH
        return message_buffer_index(phase, self.ordinal)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """A dispatch (rows with pairs) or a combine (rows are the outputs of the pairs)."""

    rows_NH: NDArray[np.float32]
    pair_rows: NDArray[np.int32]
    pair_slots: NDArray[np.int32]
    num_tokens: int = 0
    has_work: bool = False
    knows_next: bool = False


class LocalHub:
    """The common memory of all ranks. From one to another there are as many message buffers as in a
    region: what is not taken before the next message comes into its buffer is lost."""

    def __init__(self, num_ranks: int, hidden_size: int, top_k: int) -> None:
        self.num_ranks = num_ranks
        self.hidden_size = hidden_size
        self.top_k = top_k
        self._sent = threading.Condition()
        self._buffers: dict[tuple[Member, Member], dict[int, tuple[_Place, _Message]]] = {}

    def exchange(
        self, member: Member, monitor: StepMonitor, clock: Clock, exchange_deadline_ms: float
    ) -> LocalExchange:
        return LocalExchange(self, member, WaitPolicy(monitor, clock, exchange_deadline_ms))

    def send(self, source: Member, target: Member, place: _Place, message: _Message) -> None:
        with self._sent:
            self._buffers.setdefault((source, target), {})[place.buffer] = (place, message)
            self._sent.notify_all()

    def holds_later(self, source: Member, target: Member, place: _Place) -> bool:
        """Whether a later message is in the buffer of that place."""
        found, _ = self._buffers.get((source, target), {}).get(place.buffer, (None, None))
        return found is not None and found > place

    def take(self, source: Member, target: Member, place: _Place) -> _Message | None:
        """Raises StepAbandoned if the source has moved on to a later epoch."""
        with self._sent:
            buffers = self._buffers.get((source, target), {})
            found, message = buffers.get(place.buffer, (None, None))
            if found == place:
                return message
            if any(other.epoch > place.epoch for other, _ in buffers.values()):
                raise StepAbandoned(f"rank {source.rank} has left epoch {place.epoch}")
            return None

    def is_under_way(self, source: Member, target: Member) -> bool:
        """Whether a message has not arrived yet."""
        return False

    def park(self) -> None:
        """Waits a moment for new messages. Called without the lock."""
        with self._sent:
            self._sent.wait(_PARK_S)


class LocalExchange:
    """One rank's end of a hub."""

    def __init__(self, hub: LocalHub, member: Member, wait_policy: WaitPolicy) -> None:
        self._hub = hub
        self._member = member
        self._wait_policy = wait_policy
        self._members: list[Member] = []
        self._choice: ReplicaChoice | None = None
        self._place = _Place(Epoch(0), Step(0), 0, False, -1)
        self._num_tokens = 0
        self._has_work = self._knows_next = False
        self._pairs_of: dict[RankId, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._num_received: list[int] = []

    def adopt(self, expert_map: ExpertMap) -> None:
        """Waits until no message of an earlier epoch is under way to a member. Raises
        StepAbandoned."""
        assert expert_map.has(self._member), f"{self._member} is no member of the map"
        self._wait_policy.begin_step(expert_map.epoch, Step(0))
        self._drain(sorted(expert_map.members))
        self._place = _Place(expert_map.epoch, Step(0), 0, False, -1)
        self._members = sorted(expert_map.members)
        self._choice = choose_replicas(expert_map, self._member.rank)

    @property
    def may_change_map(self) -> bool:
        return self._place.ordinal % 2 == 1

    def begin_step(
        self, epoch: Epoch, step: Step, *, num_tokens: int, has_work: bool, knows_next: bool = False
    ) -> None:
        self._place = _Place(epoch, step, 0, False, self._place.ordinal)
        self._num_tokens = num_tokens
        self._has_work, self._knows_next = has_work, knows_next
        self._wait_policy.begin_step(epoch, step)

    def dispatch(
        self, layer: int, x_TH: NDArray[np.float32], experts_TK: NDArray[np.int32]
    ) -> Dispatched:
        assert self._choice is not None, "dispatch before adopt"
        self._wait_policy.check_epoch()
        ordinal = self._place.ordinal + 1
        self._place = self._place._replace(layer=layer, is_combine=False, ordinal=ordinal)
        turn_T1 = np.arange(len(experts_TK))[:, None] % self._choice.rank_LUE.shape[1]
        rank_TK = self._choice.rank_LUE[layer][turn_T1, experts_TK]
        slot_TK = self._choice.slot_LUE[layer][turn_T1, experts_TK]
        for member in self._members:
            token_N, k_N = np.nonzero(rank_TK == member.rank)
            self._pairs_of[member.rank] = (token_N, k_N)
            tokens, pair_rows = np.unique(token_N, return_inverse=True)
            message = _Message(
                rows_NH=x_TH[tokens],
                pair_rows=pair_rows.astype(np.int32),
                pair_slots=slot_TK[token_N, k_N],
                num_tokens=self._num_tokens,
                has_work=self._has_work,
                knows_next=self._knows_next,
            )
            self._hub.send(self._member, member, self._place, message)
        received = self._receive(self._members)
        self._num_received = [len(m.pair_rows) for m in received]
        first_rows = np.cumsum([0] + [len(m.rows_NH) for m in received])
        return Dispatched(
            x_MH=np.concatenate([m.rows_NH for m in received]),
            rows_N=np.concatenate(
                [m.pair_rows + np.int32(f) for m, f in zip(received, first_rows, strict=False)]
            ),
            slots_N=np.concatenate([m.pair_slots for m in received]),
            any_tokens=any(m.num_tokens > 0 for m in received),
            any_work=any(m.has_work for m in received),
            all_know_next=all(m.knows_next for m in received),
        )

    def combine(self, layer: int, y_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        assert layer == self._place.layer, "combine must follow the dispatch of its layer"
        self._wait_policy.check_epoch()
        self._place = self._place._replace(is_combine=True)
        none = np.empty(0, dtype=np.int32)
        first = 0
        for member, count in zip(self._members, self._num_received, strict=True):
            if count:
                rows_NH = y_NH[first : first + count].copy()
                message = _Message(rows_NH=rows_NH, pair_rows=none, pair_slots=none)
                self._hub.send(self._member, member, self._place, message)
            first += count
        expert_ranks = [m for m in self._members if len(self._pairs_of[m.rank][0])]
        shape = (self._num_tokens, self._hub.top_k, self._hub.hidden_size)
        y_TKH = np.zeros(shape, dtype=np.float32)
        for member, message in zip(expert_ranks, self._receive(expert_ranks), strict=True):
            y_TKH[self._pairs_of[member.rank]] = message.rows_NH
        return y_TKH

    def _drain(self, targets: list[Member]) -> None:
        self._wait_policy.begin_wait()
        while late := [m.rank for m in targets if self._hub.is_under_way(self._member, m)]:
            self._wait_policy.watch(late)
            self._hub.park()
        self._wait_policy.end_wait()

    def _receive(self, sources: list[Member]) -> list[_Message]:
        """One message of the current exchange from each source. Raises StepAbandoned."""
        self._wait_policy.begin_wait()
        missing = list(sources)
        while True:
            missing = [s for s in missing if self._hub.take(s, self._member, self._place) is None]
            if not missing:
                break
            self._wait_policy.watch([source.rank for source in missing])
            self._hub.park()
        self._wait_policy.end_wait()
        # They are read once all are there. Until then those of the first ones must stay.
        found = [self._hub.take(source, self._member, self._place) for source in sources]
        assert None not in found, "a message was overwritten within its epoch"
        return [message for message in found if message is not None]
