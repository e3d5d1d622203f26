"""A card of the simulated cluster, under the real protocol of cards: graphs that meet by counting,
as Mooncake's kernels do, on virtual time. What a graph took from whom decides its tokens: a message
of another graph, a slot that is half loaded or the share of a masked rank changes what a client
sees.

A graph holds, for each MoE layer, a dispatch and a combine. In each of these it sends one message
to every rank whose bit in the mask is set, and waits for one message from each such rank. It takes
the oldest message that lies there, whichever graph has sent it: Mooncake's kernels count, and know
no number. Messages from masked ranks are wiped. After `graph_timeout_s` in one wait the bits of the
silent ranks are cleared.
"""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.checkpoint.slot_ledger import SlotLedger
from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.members import MaskChange
from gpu_worker.cuda.experts.expert_form import ExpertForm
from gpu_worker.cuda.experts.slots import SlotAssignment, SlotUpload
from gpu_worker.cuda.sampling_inputs import RowDraw
from gpu_worker.engine.step_batch import StepBatch
from gpu_worker.exchange.replica_policy import NO_SLOT
from shared.types import EMPTY_SLOT, Incarnation, Member, RankId
from tests.sim.sim_loop import SimLoop, SimProcess, outside_processes, pause, pause_in_driver
from tests.sim.sim_model import NUM_LAYERS, PRIME, TOP_K, SimModel, expert_output, experts_of

BOX_MESSAGES_MAX = 2
"""A rank is at most one graph ahead of another."""
DRAIN_POLL_S = 0.001
_GARBAGE = 4711


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSizes:
    """How the cards of an instance behave."""

    ranks_per_card: int = 1
    time_sliced: bool = False  # the ranks of a card compute in turn, not at once
    step_s: float = 0.005  # a graph's own work, without its waits
    graph_timeout_s: float = 5.0
    map_s: tuple[float, float] = (0.001, 0.01)
    unmap_s: tuple[float, float] = (0.001, 0.01)  # Python's lock is held
    expert_s: tuple[float, float] = (0.0002, 0.002)  # to copy one expert into a slot
    read_s: tuple[float, float] = (0.002, 0.02)  # to read one expert from the checkpoint
    cached_share: float = 0.8  # of experts that have a copy on the host
    has_pauses: bool = True  # processes and hosts stand still
    load_stalls: tuple[float, ...] = ()  # a load holds Python's lock for one of these

    @property
    def settle_s(self) -> float:
        """After the last fault: an outage of etcd, the mapping of all joiners, and an answer of 40
        tokens that begins again."""
        return 20.0 + 100 * self.step_s * (self.ranks_per_card if self.time_sliced else 1)


class Row(NamedTuple):
    """A token on its way to an expert: the `choice`-th of the token's experts."""

    token: int
    choice: int
    layer: int
    slot: int
    value: int


class Answer(NamedTuple):
    """What an expert makes of a row."""

    token: int
    choice: int
    value: int


class Message(NamedTuple):
    """`serial` numbers the graphs of all ranks; the protocol never sees it. `answers`: the graph
    whose dispatch a combine answers."""

    source: Member
    serial: int
    answers: int
    content: tuple[Any, ...]


class SimCard:
    """The kernels of all processes on one card. Unmapping waits until none runs."""

    def __init__(self) -> None:
        self.devices: list[SimDevice] = []
        self._when_idle: list[Callable[[], None]] = []

    def num_busy(self) -> int:
        return sum(bool(d.queue) for d in self.devices)

    def call_when_idle(self, then: Callable[[], None]) -> None:
        self._when_idle.append(then)
        self.look_again()

    def look_again(self) -> None:
        if not self.num_busy():
            waiting, self._when_idle = self._when_idle, []
            for then in waiting:
                then()


class Fabric:
    """All cards, the devices of all incarnations, and what must not have happened."""

    def __init__(self, loop: SimLoop, sizes: CardSizes, seed: int) -> None:
        self.loop = loop
        self.sizes = sizes
        self.rng = random.Random(seed * 31 + 5)
        self.devices: dict[Member, SimDevice] = {}
        self.violations: list[str] = []
        self._cards: dict[int, SimCard] = {}
        self._serial = 0

    def card_of(self, rank: RankId) -> SimCard:
        return self._cards.setdefault(rank // self.sizes.ranks_per_card, SimCard())

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial


class Wakeable(Protocol):
    def arrived(self) -> None: ...


class SimDevice:
    """What one process has on its card: captured graphs, mask, mapped buffers. Implements
    `runner.GraphDecoder`, `rank_mask.MaskDevice` and `mappings.MappedBuffer`."""

    def __init__(
        self,
        *,
        member: Member,
        num_ranks: int,
        process: SimProcess,
        fabric: Fabric,
        engine: Wakeable,
        model: SimModel,
        slots: SimSlots,
        handle_store: HandleStore,
    ) -> None:
        self.member = member  # its present incarnation
        self.process = process
        self.fabric = fabric
        self.engine = engine
        self.model = model
        self.slots = slots
        self.mask_R = np.zeros(num_ranks, dtype=np.int32)
        self.mask_R[member.rank] = 1
        self.mapped: dict[int, Member] = {}
        self.slot_of_LUE: NDArray[np.int32] = np.zeros((NUM_LAYERS, 1, 0), dtype=np.int32)
        self.boxes: dict[tuple[int, int], deque[Message]] = {}  # by source rank and phase
        self.queue: deque[SimGraph] = deque()  # launched and not ended; the first one runs
        self.former_ids: list[int] = []
        self.card = fabric.card_of(member.rank)
        self.card.devices.append(self)
        self._handle_store = handle_store
        self._will_look = False
        fabric.devices[member] = self
        process.on_death.append(self._on_death)

    # GraphDecoder --------------------------------------------------------------------------------

    def use_slots(self, slot_of_LUE: NDArray[np.int32]) -> None:
        self._check_driver()
        self.slot_of_LUE = slot_of_LUE.copy()

    def launch(self, batch: StepBatch, draws: Sequence[RowDraw] = ()) -> SimGraph:
        self._check_driver()
        graph = SimGraph(self, batch)
        self.queue.append(graph)
        if len(self.queue) == 1:
            graph.start()
        return graph

    # MaskDevice ----------------------------------------------------------------------------------

    def clear(self, ranks: Sequence[RankId]) -> None:
        self._check_driver()
        self.mask_R[list(ranks)] = 0
        self.look_soon()

    def skip_experts(self) -> None:
        self._check_driver()
        self.slot_of_LUE = np.full_like(self.slot_of_LUE, NO_SLOT)

    def set(self, change: MaskChange) -> None:
        self._check_driver()
        assert not self.queue, "the mask is set under a running graph"
        self.mask_R[:] = 0
        self.mask_R[sorted(change.active)] = 1

    def drain(self) -> None:
        while self.queue:
            pause(self.process, self.fabric.loop, DRAIN_POLL_S)
        self._check_driver()

    def check(self) -> None:
        self._check_driver()

    # MappedBuffer --------------------------------------------------------------------------------

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None:
        for rank in remote_ranks:
            assert rank not in self.mapped, "already connected"
            peer = self._incarnation_of(rank)
            pause(self.process, self.fabric.loop, self.fabric.rng.uniform(*self._sizes.map_s))
            self._check_driver()
            device = self.fabric.devices.get(peer)
            if device is None or device.process.dead:
                raise RuntimeError(f"the memory of rank {peer} cannot be mapped")
            self.mapped[rank] = peer

    def disconnect_ranks(self, remote_ranks: list[int]) -> None:
        """Holds Python's lock until no kernel of the card runs."""
        loop = self.fabric.loop
        unmap_s = self.fabric.rng.uniform(*self._sizes.unmap_s)
        pause_in_driver(
            self.process,
            loop,
            lambda end: self.card.call_when_idle(lambda: _as_handle(loop.call_later(unmap_s, end))),
        )
        for rank in remote_ranks:
            del self.mapped[rank]

    # ---------------------------------------------------------------------------------------------

    def renew(self, member: Member) -> None:
        """Its process goes on as this incarnation. Peers that have mapped a former one send here,
        and what they get from now on is of this one."""
        assert not self.queue, "a graph of the former incarnation still runs"
        self.member = member
        self.fabric.devices[member] = self

    @property
    def _sizes(self) -> CardSizes:
        return self.fabric.sizes

    def peers(self) -> list[tuple[int, Member]]:
        """Whom kernels send to and wait for."""
        own = self.member.rank
        return [(r, m) for r, m in sorted(self.mapped.items()) if r != own and self.mask_R[r]]

    def box(self, rank: int, phase: int) -> deque[Message]:
        return self.boxes.setdefault((rank, phase), deque())

    def receive(self, rank: int, phase: int, message: Message) -> None:
        if self.process.dead:
            return
        box = self.box(rank, phase)
        box.append(message)
        if len(box) > BOX_MESSAGES_MAX:
            self.fabric.violations.append(f"{len(box)} messages of {message.source} in one box")
        self.look_soon()

    def look_soon(self) -> None:
        """The running kernel looks again at its mask and at what has arrived."""
        if not self._will_look:
            self._will_look = True
            self.fabric.loop.call_soon(self._look, context=outside_processes())

    def end_graph(self, graph: SimGraph) -> None:
        assert self.queue.popleft() is graph
        self.engine.arrived()
        if self.queue:
            self.queue[0].start()
        self.card.look_again()

    def compute_s(self) -> float:
        """Of one layer."""
        shared_by = self.card.num_busy() if self._sizes.time_sliced else 1
        return self._sizes.step_s / NUM_LAYERS * shared_by * self.fabric.rng.uniform(0.8, 1.2)

    def _look(self) -> None:
        self._will_look = False
        if self.queue and not self.process.dead:
            self.queue[0].look()

    def _check_driver(self) -> None:
        if self.process.device_failed:
            raise RuntimeError("CUDA error: the context is gone")

    def _incarnation_of(self, rank: int) -> Member:
        """As Mooncake learns whom it maps."""
        (envelope,) = self._handle_store.multi_get([f"MOONCAKE_EP/{rank}/{self.member.rank}"])
        _, metadata = pickle.loads(envelope)
        (incarnation,) = metadata[6]
        return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))

    def _on_death(self) -> None:
        """Its kernels go with it."""
        self.queue.clear()
        self.card.devices.remove(self)
        self.fabric.loop.call_soon(self.card.look_again, context=outside_processes())


class SimGraph:
    """Implements `runner.LaunchedStep`. Runs in phases 0 … 2L - 1: the dispatch and the combine of
    each layer."""

    def __init__(self, device: SimDevice, batch: StepBatch) -> None:
        self._device = device
        self._batch = batch
        self._serial = device.fabric.next_serial()
        self._phase = -1
        self._is_waiting = False
        self._timer: Any = None
        self._is_done = False
        self._values_T: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._own_rows: list[Row] = []
        self._outputs_TK: NDArray[np.int64] = np.zeros((0, TOP_K), dtype=np.int64)
        self._taken: dict[int, Message] = {}
        self._mask_R = device.mask_R.copy()
        self._mismatches: list[str] = []
        self.logits_RV: Tensor = torch.zeros(0)

    def is_done(self) -> bool:
        self._device._check_driver()
        return self._is_done

    def ids(self) -> NDArray[np.int32]:
        """Asked only of a graph that is committed."""
        if self._mismatches:
            self._device.fabric.violations.append(
                f"rank {self._device.member} committed a graph that {self._mismatches[0]}"
            )
        ids: NDArray[np.int32] = self.logits_RV.numpy().argmax(axis=1).astype(np.int32)
        return ids

    def mask(self) -> NDArray[np.int32]:
        return self._mask_R

    def start(self) -> None:
        """The graph before it has ended."""
        former = self._device.former_ids
        ids = [t if t >= 0 else former[-1 - t] for t in self._batch.token_ids_T.tolist()]
        batch = replace(self._batch, token_ids_T=np.array(ids, dtype=np.int32))
        self._values_T = self._device.model._attend(batch)
        self._dispatch()

    def look(self) -> None:
        if not self._is_waiting:
            return
        device = self._device
        peers = device.peers()
        if any(not device.box(rank, self._phase) for rank, _ in peers):
            return
        self._is_waiting = False
        self._timer.cancel()
        taken = {rank: device.box(rank, self._phase).popleft() for rank, _ in peers}
        for rank in range(len(device.mask_R)):
            if rank not in taken:
                device.box(rank, self._phase).clear()
        for rank, mapped in peers:
            peer = device.fabric.devices[mapped].member
            if taken[rank].source != peer:
                self._mismatches.append(f"took a message of {taken[rank].source}, not of {peer}")
        if self._phase % 2:
            self._finish_layer(taken)
        else:
            self._taken = taken
            device.fabric.loop.call_later(
                device.compute_s(), self._combine, context=outside_processes()
            )

    def _dispatch(self) -> None:
        self._phase += 1
        device, layer = self._device, self._phase // 2
        slots = device.slots.num_slots
        rows: dict[int, list[Row]] = {rank: [] for rank in range(len(device.mask_R))}
        for token, value in enumerate(self._values_T.tolist()):
            turn = token % device.slot_of_LUE.shape[1]
            for choice, expert in enumerate(experts_of(value, layer)):
                physical = int(device.slot_of_LUE[layer, turn, expert])
                if physical != NO_SLOT:
                    rank, slot = divmod(physical, slots)
                    rows[rank].append(Row(token, choice, layer, slot, value))
        self._own_rows = rows[device.member.rank]
        self._outputs_TK = np.full((len(self._values_T), TOP_K), _GARBAGE, dtype=np.int64)
        for rank, _ in device.peers():
            self._send(rank, answers=0, content=tuple(rows[rank]))
        self._wait()

    def _combine(self) -> None:
        device = self._device
        if device.process.dead:
            return
        self._phase += 1
        self._take_answers(self._compute(self._own_rows))
        for rank, _ in device.peers():
            message = self._taken.get(rank)
            if message is None:
                self._send(rank, answers=0, content=())
            else:
                self._send(rank, answers=message.serial, content=self._compute(message.content))
        self._wait()

    def _finish_layer(self, taken: dict[int, Message]) -> None:
        for rank, message in taken.items():
            if message.answers == self._serial:
                self._take_answers(message.content)
            else:
                self._mismatches.append(
                    f"met a graph of rank {rank} that met graph {message.answers}, "
                    f"not {self._serial}"
                )
        weights_K = np.arange(1, TOP_K + 1)
        self._values_T = (self._values_T + self._outputs_TK @ weights_K) % PRIME
        if self._phase + 1 < 2 * NUM_LAYERS:
            self._dispatch()
        else:
            self._end()

    def _end(self) -> None:
        device = self._device
        logits_RV = device.model._logits(self._values_T[self._batch.logits_rows_R])
        self.logits_RV = torch.from_numpy(logits_RV)
        device.former_ids = logits_RV.argmax(axis=1).tolist()
        self._mask_R = device.mask_R.copy()
        self._is_done = True
        device.end_graph(self)

    def _send(self, rank: int, *, answers: int, content: tuple[Any, ...]) -> None:
        device = self._device
        target = device.fabric.devices[device.mapped[rank]]
        message = Message(device.member, self._serial, answers, content)
        target.receive(device.member.rank, self._phase, message)

    def _wait(self) -> None:
        device = self._device
        self._is_waiting = True
        self._timer = device.fabric.loop.call_later(
            device.fabric.sizes.graph_timeout_s,
            self._time_out,
            self._phase,
            context=outside_processes(),
        )
        device.look_soon()

    def _time_out(self, phase: int) -> None:
        device = self._device
        if device.process.dead or not self._is_waiting or self._phase != phase:
            return
        for rank, _ in device.peers():
            if not device.box(rank, phase):
                device.mask_R[rank] = 0
        self.look()

    def _compute(self, rows: Sequence[Row]) -> tuple[Answer, ...]:
        contents = self._device.slots.contents
        answers = []
        for row in rows:
            expert = int(contents[row.layer, row.slot])
            known = expert >= 0
            value = expert_output(row.value, row.layer, expert) if known else _GARBAGE
            answers.append(Answer(row.token, row.choice, value))
        return tuple(answers)

    def _take_answers(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._outputs_TK[answer.token, answer.choice] = answer.value


@dataclass(slots=True)
class LoadCounts:
    """Of one incarnation: calls of the loader, and experts that were copied."""

    num_loads: int = 0
    num_experts: int = 0


_FORM = ExpertForm(hidden_size=1, inner_size=1, dtype=torch.float32)


@dataclass
class SimSlots:
    """Implements `slot_loader.LoadableSlots`, and what the loader reads from: the host's copies
    (`ExpertCopies`) and the checkpoint (`ExpertSource`). Copying takes time, in which the slots
    are EMPTY."""

    num_slots: int
    process: SimProcess
    fabric: Fabric
    ledger: SlotLedger = field(init=False)
    counts: LoadCounts = field(default_factory=LoadCounts)
    form: ExpertForm = _FORM

    def __post_init__(self) -> None:
        self.ledger = SlotLedger(NUM_LAYERS, self.num_slots)
        share = self.fabric.sizes.cached_share
        self._is_cached = [self.fabric.rng.random() < share for _ in range(64)]

    @property
    def contents(self) -> NDArray[np.int16]:
        return self.ledger.contents

    def begin_load(self, wanted_LS: NDArray[np.int16]) -> list[SlotAssignment]:
        self.counts.num_loads += 1
        if stalls := self.fabric.sizes.load_stalls:
            self._stall(self.fabric.rng.choice(stalls))
        present_LS = self.contents
        differs_LS = wanted_LS != present_LS
        for layer, slot in np.argwhere(differs_LS & (wanted_LS < 0)).tolist():
            self.ledger.set(layer, slot, EMPTY_SLOT)
        return [
            SlotAssignment(layer, slot, int(wanted_LS[layer, slot]))
            for layer, slot in np.argwhere(differs_LS & (wanted_LS >= 0)).tolist()
        ]

    def load(self, uploads: Sequence[SlotUpload]) -> list[SlotUpload]:
        self.counts.num_experts += len(uploads)
        for upload in uploads:
            self.ledger.set(upload.layer, upload.slot, EMPTY_SLOT)
        for upload in uploads:
            self._pause(self.fabric.sizes.expert_s)
            self.ledger.set(upload.layer, upload.slot, upload.expert)
        return []

    def checksum(self, layer: int, expert: int) -> int:
        return 0

    def reject(self, layer: int, expert: int) -> None:
        raise AssertionError("a simulated copy is never damaged")

    def is_pinned(self, layer: int, expert: int) -> bool:
        return bool(expert % 2)

    def cached_values(self, layer: int, expert: int) -> Tensor | None:
        return _VALUES if self._is_cached[layer * 32 + expert % 32] else None

    def cache_expert(self, layer: int, expert: int) -> Tensor | None:
        self._pause(self.fabric.sizes.read_s)
        return _VALUES

    def fill_in_background(self) -> None: ...

    def pause(self) -> None: ...

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        self._pause(self.fabric.sizes.read_s)

    def _pause(self, within_s: tuple[float, float]) -> None:
        pause(self.process, self.fabric.loop, self.fabric.rng.uniform(*within_s))

    def _stall(self, seconds: float) -> None:
        loop = self.fabric.loop
        pause_in_driver(self.process, loop, lambda end: _as_handle(loop.call_later(seconds, end)))


_VALUES = torch.zeros(_FORM.num_values)


def _as_handle(_: object) -> None:
    """For a callback that returns nothing."""
