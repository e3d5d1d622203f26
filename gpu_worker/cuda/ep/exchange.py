"""The exchange between CUDA ranks: Mooncake's elastic EP Buffer over NVLink or IBGDA. Ranks come
and go; the captured CUDA graphs stay. Which ranks kernels wait for is `rank_mask`'s to decide.

Shape letters: T rows of a step's graph (padded), K top-k, H hidden size, P size of a row on its
way (H rounded up), R ranks, S slots of a rank, M rows that a slot can receive (R times
`step_tokens_max`).

Ranks meet by counting exchanges, not by epoch: a graph holds whole dispatch/combine pairs, all
ranks replay the same sequence, and a rank may be one graph ahead of another. So a death needs no
agreement on a step. A rank that committed goes on to its next step, and the replay of the spoilt
step on its peers meets that one; what it sends there is computed by experts that are the same in
both epochs. Joins, common sleep and the overwriting of slots do need agreement: see
`graph_barrier`.

A rank that has abandoned a step may wait for a map only, never for what a peer does at the end of a
step: that peer may be one graph ahead, and wait for this rank. So weights are loaded beside the
steps.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.members import MaskChange
from gpu_worker.cuda.ep.rank_mask import RankMask
from gpu_worker.cuda.streams import on_stream
from gpu_worker.exchange.replica_policy import NO_SLOT
from gpu_worker.exchange.worker_thread import WorkerThread
from shared.clock import Clock
from shared.records import ExchangeHandles
from shared.types import Member, RankId

_ROW_UNIT, _FP8_ROW_UNIT = 256, 512
"""Mooncake's kernels know only rows of a multiple of so many values: combine's warps read 512 bytes
at once, and a row of fp8 leaves with its scales in units of 16 bytes."""


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

    @property
    def row_size(self) -> int:
        """The values of a row as it travels: those of a token, and what fills it up."""
        unit = _FP8_ROW_UNIT if self.fp8 else _ROW_UNIT
        return -(-self.hidden_size // unit) * unit


class Received(NamedTuple):
    """Rows for this rank's slots: `x_SMP[s, :counts_S[s]]`, the rest undefined. bf16; or fp8 with a
    scale per 128 values in `EpExchange.scales`."""

    x_SMP: Tensor
    counts_S: Tensor


class CudaMask:
    """Implements `rank_mask.MaskDevice` on Mooncake's mask."""

    def __init__(self, buffer: Any, device: torch.device, num_ranks: int) -> None:
        self._buffer = buffer
        self._device = device
        self.mask_R: Tensor = buffer._active_ranks
        """int32 on the device, at one place for ever: 1 for each rank that kernels wait for."""
        # Of high priority, so that it shares no queue of the card with the waiting kernels.
        self._side_stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._zero = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._wanted_R = torch.zeros(num_ranks, dtype=torch.int32).pin_memory()
        self._checked = torch.zeros(1, dtype=torch.int32, device=device)
        self._slot_tables: tuple[Tensor, Tensor] | None = None  # the one in use, and an empty one

    def watch_slot_table(self, slot_of_LUE: Tensor) -> None:
        """The table from which running kernels take each token's slots."""
        empty_LUE = torch.full(slot_of_LUE.shape, NO_SLOT, dtype=slot_of_LUE.dtype)
        self._slot_tables = slot_of_LUE, empty_LUE.pin_memory()

    def skip_experts(self) -> None:
        if self._slot_tables is None:
            return
        slot_of_LUE, empty_LUE = self._slot_tables
        with on_stream(self._side_stream):
            slot_of_LUE.copy_(empty_LUE, non_blocking=True)
            self._side_stream.synchronize()

    def clear(self, ranks: Sequence[RankId]) -> None:
        with on_stream(self._side_stream):
            for rank in ranks:
                self.mask_R[rank : rank + 1].copy_(self._zero, non_blocking=True)
            self._side_stream.synchronize()

    def set(self, change: MaskChange) -> None:
        for rank in change.mask:
            self._buffer.update_mask_buffer(rank, mask=True)
        for rank in change.unmask:
            self._buffer.update_mask_buffer(rank, mask=False)
        # The Buffer does not know which bits `clear` or a timeout has cleared.
        self._wanted_R.zero_()
        self._wanted_R[sorted(change.active)] = 1
        self.mask_R.copy_(self._wanted_R, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()

    def drain(self) -> None:
        torch.cuda.synchronize(self._device)

    def check(self) -> None:
        """A context that is gone fails every call, also one that touches no peer's memory."""
        with on_stream(self._side_stream):
            self._checked.copy_(self._zero, non_blocking=True)
            self._side_stream.synchronize()


class EpExchange:
    """One rank's end. `dispatch` and `combine` belong to the engine thread; for `mask` see
    `RankMask`."""

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
        handle_store = HandleStore()
        self._buffer_id = uuid.uuid4().hex
        self._buffer = _open_buffer(member.rank, shape, handle_store, timeout_ms, device)
        self._cuda_mask = cuda_mask = CudaMask(self._buffer, device, shape.num_ranks)
        self.mask_R = cuda_mask.mask_R
        self.mask = RankMask(
            member,
            device=cuda_mask,
            buffer=self._buffer,
            handle_store=handle_store,
            clock=clock,
            mapping_worker=WorkerThread("mappings", lambda: torch.cuda.set_device(device)),
        )
        self._handles: dict[int, tuple[Any, ...]] = {}
        self.scales: Tensor | None = None  # of the last dispatch, `[S, M, P / 128]`

    def watch_slot_table(self, slot_of_LUE: Tensor) -> None:
        """`[L, U, E]` int32 on the device, the table that the decoder's kernels read. With it steps
        that nobody will deliver send nothing to experts."""
        self._cuda_mask.watch_slot_table(slot_of_LUE)

    @property
    def step_tokens_max(self) -> int:
        return self._shape.step_tokens_max

    @property
    def row_size(self) -> int:
        return self._shape.row_size

    def handles(self) -> ExchangeHandles:
        """What peers must know to write into this rank's buffer; the same for all of them, and for
        all incarnations of this process."""
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
            buffer_id=self._buffer_id,
        )

    # A step --------------------------------------------------------------------------------------

    def dispatch(self, layer: int, x_TP: Tensor, slots_TK: Tensor) -> Received:
        """`slots_TK`: int64 physical slots, `rank * S + slot`; -1 for none."""
        x, counts_S, handle, _, _ = self._buffer.dispatch(
            x_TP,
            slots_TK,
            self._shape.step_tokens_max,
            self._shape.num_slots,
            use_fp8=self._shape.fp8,
        )
        self._handles[layer] = handle
        if self._shape.fp8:
            x, self.scales = x
        return Received(x, counts_S)

    def combine(self, layer: int, y_SMP: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum over K of what the matching dispatch's rows became, bf16 `[T, P]`. It is
        summed in the order of K, whoever computed what. `weights_TK` is fp32."""
        handle = self._handles.pop(layer)
        result: Tensor = self._buffer.combine(y_SMP, slots_TK, weights_TK, handle)[0]
        return result


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
            shape.step_tokens_max, shape.row_size, shape.num_ranks, shape.num_slots
        )
        buffer.update_memory_buffers(shape.num_ranks, shape.slots_per_rank, nbytes)
    return buffer
