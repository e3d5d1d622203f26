"""The exchange between CUDA ranks: Mooncake's elastic EP Buffer over NVLink or IBGDA, with ranks
that come and go under CUDA graphs that stay.

Shape letters: T rows of a step's graph (padded), K top-k, H hidden size, R ranks, S slots of a
rank, M rows that a slot can receive (R times `step_tokens_max`).

Theory of operation. Each kernel waits for what it needs of every rank whose bit is set in one mask
on the device, and reads that mask while it waits. A bit goes from 1 to 0 in two ways: by
`release`, a host write on a side stream, as soon as a verdict is known; or by the kernel's own
timeout, a backstop. Either way the kernels of the step go on and its result lacks something. The
mask travels to the host in the copy that brings the sampled tokens, so that looking at it costs
nothing: a step that lost a bit raises StepAbandoned and is never delivered.

Ranks meet by counting exchanges, not by epoch: a graph holds whole dispatch/combine pairs, all
ranks replay the same sequence, and a rank may be one graph ahead of another. So a death needs no
agreement on a step. A rank that committed goes on to a next step, which its peers' replay of the
spoilt one matches; what it sends there is computed by experts that are the same in both epochs.

For the same reason a rank that has abandoned a step may wait for a map only, never for what a peer
does at the end of a step: that peer may be one graph ahead, and wait for it. So weights are loaded
beside the steps; and into a slot in use only after all survivors have released the dead, whose last
kernels may still complete a step of theirs.

A join does need agreement: `adopt` a map with a joiner before the same graph on every rank, and let
the joiner replay its first only after all have done so, for a rank that does not know it wipes
what it sends.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.cuda.ep_members import EpMembers
from gpu_worker.cuda.step_report import StepReport
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.records import ExchangeHandles
from shared.types import Epoch, Incarnation, Member, RankId, Step

FP8_BLOCK = 128
"""Values that share a scale in an fp8 dispatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpShape:
    """The same on every rank of an instance: it lays out the buffers. `step_tokens_max` bounds T; a
    graph of any smaller T meets graphs of any other."""

    num_ranks: int
    slots_per_rank: int
    hidden_size: int
    step_tokens_max: int
    fp8: bool = False

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_per_rank

    @property
    def received_rows_max(self) -> int:
        return self.num_ranks * self.step_tokens_max


@dataclass(frozen=True, slots=True, kw_only=True)
class EpTimeouts:
    """`step_ms` is baked into captured graphs: how long a kernel waits for a rank before it goes on
    without it. `warm_up_ms` serves while kernels are compiled and graphs captured; `connect_ms`
    bounds the wait for a peer's handles."""

    step_ms: int
    warm_up_ms: int = 60_000
    connect_ms: int = 60_000


class Received(NamedTuple):
    """Rows for this rank's slots: `x_SMH[s, :counts_S[s]]`, the rest undefined. bf16; or fp8 with a
    scale per FP8_BLOCK values in `EpExchange.scales`."""

    x_SMH: Tensor
    counts_S: Tensor


class Rendezvous(Protocol):
    """What the Buffer asks of its store, in `connect_ranks`. See `ep_handles.HandleBook`."""

    def set(self, key: str, value: bytes) -> None: ...

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None: ...

    def multi_get(self, keys: Sequence[str]) -> list[bytes]: ...

    def delete_key(self, key: str) -> bool: ...


class EpExchange:
    """One rank's end. `begin_step`, `dispatch`, `combine`, `report` and `adopt` belong to the
    engine thread; `release` to any; `connect` and `disconnect` to another one, beside running
    steps."""

    def __init__(
        self,
        member: Member,
        shape: EpShape,
        rendezvous: Rendezvous,
        timeouts: EpTimeouts,
        *,
        device: torch.device,
    ) -> None:
        self._member = member
        self._shape = shape
        self._timeouts = timeouts
        self._device = device
        self._buffer = _open_buffer(member.rank, shape, rendezvous, timeouts, device)
        self.mask_R: Tensor = self._buffer._active_ranks
        """int32 on the device, at one place for ever: 1 for each rank that kernels wait for."""
        # Of high priority, so that it shares no queue of the card with the waiting kernels.
        self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._zero = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._wanted_R = torch.zeros(shape.num_ranks, dtype=torch.int32).pin_memory()
        self._report = StepReport(shape.num_ranks, shape.step_tokens_max, device)
        self._who = EpMembers(member)
        self._mask_lock = threading.Lock()
        self._connect_lock = threading.Lock()
        self._handles: dict[int, tuple[Any, ...]] = {}
        self.scales: Tensor | None = None  # of the last dispatch, `[S, M, H / FP8_BLOCK]`

    # Who takes part ------------------------------------------------------------------------------

    def handles(self) -> ExchangeHandles:
        """What peers must know to write into this rank's buffer; the same for all of them."""
        address, key, subnet, interface, queue_pairs, local_ids, ipc = (
            self._buffer._get_local_peer_metadata()
        )
        return ExchangeHandles(
            host=socket.gethostname(),
            address=address,
            remote_key=key,
            subnet_prefix=subnet,
            interface_id=interface,
            queue_pairs=tuple(queue_pairs),
            local_ids=tuple(local_ids),
            ipc_handle=tuple(ipc),
        )

    def connect(self, peers: Mapping[RankId, Incarnation]) -> None:
        """Meet these lives; they stay masked until a map names them. Raises ConnectionError where a
        former life of theirs is in the adopted map still, or their memory cannot be mapped, as that
        of one who has just died; and what the rendezvous raises."""
        with self._connect_lock, torch.cuda.device(self._device):
            self._part(peers)
            try:
                self._buffer.connect_ranks(sorted(peers), activate=False)
            except RuntimeError as error:  # Mooncake's only kind
                raise ConnectionError(f"ranks {sorted(peers)}: {error}") from error
            with self._mask_lock:
                self._who.meet(peers)

    def has_met(self, member: Member) -> bool:
        return self._who.has_met(member)

    def disconnect(self, ranks: Collection[RankId]) -> None:
        """Unmap the buffers of ranks that the adopted map leaves out."""
        with self._connect_lock, torch.cuda.device(self._device):
            self._part(ranks)

    def _part(self, ranks: Collection[RankId]) -> None:
        with self._mask_lock:
            met = self._who.part(ranks)
        if met:
            self._buffer.disconnect_ranks(met)

    @property
    def members(self) -> frozenset[Member]:
        """Of the adopted map."""
        return self._who.members

    def release(self, dead: Collection[Member], epoch: Epoch) -> None:
        """Map `epoch` is without these lives: let kernels wait for them no longer. Safe at any
        moment; it returns when the running kernel can see it, and no step that has not completed by
        then will be delivered. Lives that this rank has not met, or whose successors it has met
        already, are nothing to it."""
        with self._mask_lock, torch.cuda.device(self._device):
            ranks = self._who.give_up(dead, epoch)
            with torch.cuda.stream(self._side):
                for rank in ranks:
                    self.mask_R[rank : rank + 1].copy_(self._zero, non_blocking=True)
            self._side.synchronize()

    def adopt(self, expert_map: ExpertMap) -> None:
        """Between steps, nothing in flight. Graphs stay as they are."""
        with self._mask_lock:
            change = self._who.adopt(expert_map)
            for rank in change.mask:
                self._buffer.update_mask_buffer(rank, mask=True)
            for rank in change.unmask:
                self._buffer.update_mask_buffer(rank, mask=False)
            # Bits that `release` or a timeout has cleared behind the Buffer's back, too.
            self._wanted_R.zero_()
            self._wanted_R[sorted(change.active)] = 1
            self.mask_R.copy_(self._wanted_R, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()

    # A step --------------------------------------------------------------------------------------

    def begin_step(self, epoch: Epoch, step: Step) -> None:
        """No I/O. Raises StepAbandoned after a step that was, until a newer map is adopted."""
        adopted = self._who.epoch
        assert epoch == adopted, f"step {step} of epoch {epoch}, but {adopted} is adopted"
        if self._who.spoilt:
            raise StepAbandoned(f"epoch {epoch} has lost a rank")

    def dispatch(self, layer: int, x_TH: Tensor, slots_TK: Tensor) -> Received:
        """`slots_TK`: int64 physical slots, `rank * S + slot`; -1 for none."""
        x, counts_S, handle, _, _ = self._buffer.dispatch(
            x_TH,
            slots_TK,
            self._shape.step_tokens_max,
            self._shape.num_slots,
            use_fp8=self._shape.fp8,
        )
        self._handles[layer] = handle
        if self._shape.fp8:
            x, self.scales = x
        return Received(x, counts_S)

    def combine(self, layer: int, y_SMH: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over K of what the matching dispatch's rows became, bf16 `[T, H]`. It is
        summed in the order of K, whoever computed what. `weights_TK` is fp32."""
        handle = self._handles.pop(layer)
        result: Tensor = self._buffer.combine(y_SMH, slots_TK, weights_TK, handle)[0]
        return result

    def report(self, tokens_T: Tensor) -> None:
        """Enqueue the step's one copy to the host, the mask with the sampled tokens. Last in the
        graph."""
        self._report.enqueue(self.mask_R, tokens_T)

    def mask_after_step(self) -> NDArray[np.int32]:
        """`[R]`, 1 for each rank that took part to the end. Valid once the step has completed."""
        return self._report.mask

    def check_step(self, mask_R: NDArray[np.int32]) -> None:
        """`mask_R` as the completed step has left it. Raises StepAbandoned where it lacked a
        member."""
        if lost := self._who.lost(mask_R):
            raise StepAbandoned(f"ranks {lost} left in a step of epoch {self._who.epoch}")

    def tokens_after_step(self, num_tokens: int) -> NDArray[np.int32]:
        """What the completed step sampled. Raises StepAbandoned where it lacked a member."""
        self.check_step(self._report.mask)
        return self._report.tokens[:num_tokens]

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Kernels launched in here may wait long for peers that still compile theirs."""
        self._buffer.timeout_ms = self._timeouts.warm_up_ms
        try:
            yield
        finally:
            self._buffer.timeout_ms = self._timeouts.step_ms

    def close(self) -> None:
        """Nothing may be in flight, and no graph may be replayed afterwards."""
        torch.cuda.synchronize(self._device)
        self._buffer.destroy()


def _open_buffer(
    rank: RankId,
    shape: EpShape,
    rendezvous: Rendezvous,
    timeouts: EpTimeouts,
    device: torch.device,
) -> Any:
    from mooncake.mooncake_ep_buffer import Buffer  # CUDA builds only

    with torch.cuda.device(device):
        buffer = Buffer.create_elastic(
            rank=rank,
            explicitly_destroy=True,
            tcp_store_group=rendezvous,
            timeout_ms=timeouts.step_ms,
            metadata_timeout_ms=timeouts.connect_ms,
        )
        nbytes = Buffer.get_low_latency_buffer_size_hint(
            shape.step_tokens_max, shape.hidden_size, shape.num_ranks, shape.num_slots
        )
        buffer.update_memory_buffers(shape.num_ranks, shape.slots_per_rank, nbytes)
    return buffer
