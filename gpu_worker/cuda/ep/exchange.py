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
What does need agreement, joins, common sleep, slots to be overwritten, is `graph_barrier`'s.

A rank that has abandoned a step may wait for a map only, never for what a peer does at the end of a
step: that peer may be one graph ahead, and wait for it. So weights are loaded beside the steps.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.mappings import EpMappings
from gpu_worker.cuda.ep.members import EpMembers
from gpu_worker.cuda.streams import on_stream
from shared.clock import Clock
from shared.errors import StepAbandoned
from shared.expert_map import ExpertMap
from shared.records import ExchangeHandles
from shared.types import Epoch, Member, RankId

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


class Received(NamedTuple):
    """Rows for this rank's slots: `x_SMH[s, :counts_S[s]]`, the rest undefined. bf16; or fp8 with a
    scale per FP8_BLOCK values in `EpExchange.scales`."""

    x_SMH: Tensor
    counts_S: Tensor


class EpExchange:
    """One rank's end. `dispatch`, `combine`, `check_step` and `adopt` belong to the engine thread;
    `release` to any; `connect` to another one, beside running steps."""

    def __init__(
        self,
        member: Member,
        shape: EpShape,
        *,
        timeout_ms: int,
        device: torch.device,
        clock: Clock,
    ) -> None:
        """`timeout_ms` is baked into captured graphs: a kernel waits so long for a rank before it
        goes on without it."""
        self._shape = shape
        self._device = device
        handle_store = HandleStore()
        self._buffer = _open_buffer(member.rank, shape, handle_store, timeout_ms, device)
        self.mask_R: Tensor = self._buffer._active_ranks
        """int32 on the device, at one place for ever: 1 for each rank that kernels wait for."""
        # Of high priority, so that it shares no queue of the card with the waiting kernels.
        self._side_stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._zero = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._wanted_R = torch.zeros(shape.num_ranks, dtype=torch.int32).pin_memory()
        self._ep_members = EpMembers(member)
        self._mask_lock = threading.Lock()
        self._mappings = EpMappings(
            self._ep_members,
            self._mask_lock,
            self._buffer,
            handle_store,
            clock,
            init_thread=lambda: torch.cuda.set_device(device),
        )
        self._handles: dict[int, tuple[Any, ...]] = {}
        self.scales: Tensor | None = None  # of the last dispatch, `[S, M, H / FP8_BLOCK]`

    @property
    def step_tokens_max(self) -> int:
        return self._shape.step_tokens_max

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
            step_tokens_max=self._shape.step_tokens_max,
        )

    def connect(self, peer: Member, handles: ExchangeHandles) -> None:
        """Meet this life; it stays masked until a map names it. Raises ConnectionError where a
        former life of its rank is in the adopted map still, or its memory cannot be mapped, as that
        of one who has just died."""
        self._mappings.connect(peer, handles)

    def is_connected(self, member: Member) -> bool:
        return self._ep_members.is_connected(member)

    def release(self, dead: Collection[Member], epoch: Epoch) -> None:
        """Map `epoch` is without these lives: let kernels wait for them no longer. Safe at any
        moment; it returns when the running kernel can see it, and no step that has not completed by
        then will be delivered. Lives that this rank has not met, or whose successors it has met
        already, are nothing to it."""
        with self._mask_lock:
            ranks = self._ep_members.give_up(dead, epoch)
            with on_stream(self._side_stream):
                for rank in ranks:
                    self.mask_R[rank : rank + 1].copy_(self._zero, non_blocking=True)
                self._side_stream.synchronize()

    def adopt(self, expert_map: ExpertMap) -> None:
        """Between steps, nothing in flight; for a map with joiners, nowhere. Graphs stay as they
        are. A member whose buffer cannot be mapped stays masked, so that no step is delivered."""
        self._mappings.map_members(expert_map)
        with self._mask_lock:
            change = self._ep_members.adopt(expert_map)
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

    def check_step(self, mask_R: NDArray[np.int32]) -> None:
        """`mask_R` as the completed step has left it. Raises StepAbandoned where it lacked a
        member."""
        if lost := self._ep_members.lost_ranks(mask_R):
            raise StepAbandoned(f"ranks {lost} left in a step of epoch {self._ep_members.epoch}")


def _open_buffer(
    rank: RankId,
    shape: EpShape,
    handle_store: HandleStore,
    timeout_ms: int,
    device: torch.device,
) -> Any:
    from mooncake.mooncake_ep_buffer import Buffer  # CUDA builds only

    with torch.cuda.device(device):
        buffer = Buffer.create_elastic(
            rank=rank,
            explicitly_destroy=True,
            tcp_store_group=handle_store,
            timeout_ms=timeout_ms,
        )
        nbytes = Buffer.get_low_latency_buffer_size_hint(
            shape.step_tokens_max, shape.hidden_size, shape.num_ranks, shape.num_slots
        )
        buffer.update_memory_buffers(shape.num_ranks, shape.slots_per_rank, nbytes)
    return buffer
