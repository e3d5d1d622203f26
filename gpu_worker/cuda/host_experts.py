"""Pinned copies of experts in the host's memory, so that an orphan comes into a slot as fast as the
link allows: no file is read for it, nothing converted.

A thread fills them in once the rank has its own experts, and they stay. It is no less urgent than
others to the scheduler: it holds the interpreter's lock now and then, which steps need. Each rank
has its own copies: memory is pinned for one process.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.cuda.expert_reader import ExpertReader
from gpu_worker.cuda.host_memory import PinnedBlock
from shared.errors import CheckpointError

log = structlog.get_logger()

BLOCK_BYTES = 64 * 2**20
"""Pinned at a time, where several experts fit into it."""

_SHARE_OF_FREE = 4
_GB = 1e9


def bytes_for_copies(host_experts_gb: float | None, free_bytes: int, ranks_of_host: int) -> int:
    """What this rank may pin. None: its part of a quarter of what is free, so that most stays with
    the page cache, which the copies are filled from and other ranks load by. Never more than is
    free: the kernel would end a process for it."""
    if host_experts_gb is None:
        return free_bytes // (_SHARE_OF_FREE * ranks_of_host)
    return min(int(host_experts_gb * _GB), free_bytes)


class HostExperts:
    """Layers are MoE layers. One thread fills, another takes; a copy once given stays valid."""

    def __init__(
        self,
        reader: ExpertReader,
        *,
        bytes_max: int,
        device: torch.device,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._reader = reader
        self._device = device
        self._experts_of_block = max(1, block_bytes // reader.num_bytes)
        self._bytes_max = bytes_max
        self._blocks: list[PinnedBlock] = []
        self._copies: dict[tuple[int, int], Tensor] = {}
        self._rooms: list[Iterable[Tensor]] = []
        self._thread: threading.Thread | None = None
        self._may_fill = threading.Event()
        self._closed = False

    def reserve(self, num_experts: int) -> None:
        """Pins all the room there will be, for so many of all layers at most: while steps run,
        pinning would hold them up, because the driver's lock is theirs as well. Raises OSError
        where the host refuses."""
        num = min(num_experts, self._bytes_max // self._reader.num_bytes)
        self._rooms = list(self._new_blocks(num))

    def copy_of(self, layer: int, expert: int) -> Tensor | None:
        """Flat as `Refill.values`, where it is here."""
        return self._copies.get((layer, expert))

    def fill_in_background(self, resident_LS: NDArray[np.int16], num_experts: int) -> None:
        """Starts or goes on with what it was started with."""
        self._may_fill.set()
        if self._thread is None and self._bytes_max >= self._reader.num_bytes:
            order = fill_order(resident_LS, num_experts)
            self._thread = threading.Thread(
                target=self._fill_quietly, args=(order,), name="host-experts", daemon=True
            )
            self._thread.start()

    def pause(self) -> None:
        """Until `fill_in_background`: at most the expert being read is still finished."""
        self._may_fill.clear()

    def wait_until_filled(self, timeout_s: float) -> bool:
        """Whether nothing more will come."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Gives the memory back; nobody may use a copy any more."""
        self._closed = True
        self._may_fill.set()
        self.wait_until_filled(timeout_s=60)
        self._copies.clear()
        for block in self._blocks:
            block.unpin()
        self._blocks.clear()

    def _fill_quietly(self, order: Iterator[tuple[int, int]]) -> None:
        """A copy is a convenience: what prevents it is told, and met again where it matters."""
        try:
            self._fill(order)
        except (CheckpointError, OSError) as error:
            log.warning("host_experts_stopped", detail=str(error), **self._so_far())
        else:
            log.info("host_experts_filled", **self._so_far())

    def _fill(self, order: Iterator[tuple[int, int]]) -> None:
        places = itertools.chain.from_iterable(self._rooms)
        for (layer, expert), values_N in zip(order, places, strict=False):
            self._may_fill.wait()
            if self._closed:
                return
            self._reader.read(layer, expert, values_N)
            self._copies[layer, expert] = values_N

    def _new_blocks(self, left: int) -> Iterator[Iterable[Tensor]]:
        """Room for so many experts, a block at a time."""
        each = self._reader.num_bytes
        while left > 0:
            block = PinnedBlock(min(left, self._experts_of_block) * each, self._device)
            self._blocks.append(block)
            rooms = block.bytes_B.view(self._reader.dtype).view(-1, self._reader.num_values)
            left -= rooms.shape[0]
            yield rooms.unbind()

    def _so_far(self) -> dict[str, float]:
        """Fields for a log line."""
        num = len(self._copies)
        return {"experts": num, "gb": round(num * self._reader.num_bytes / _GB, 3)}


def fill_order(resident_LS: NDArray[np.int16], num_experts: int) -> Iterator[tuple[int, int]]:
    """(layer, expert) pairs: those that no slot here holds before the others; where not all find
    room, every layer has its share."""
    num_layers = resident_LS.shape[0]
    held = {(layer, int(e)) for layer in range(num_layers) for e in resident_LS[layer]}
    pairs = [(layer, e) for e in range(num_experts) for layer in range(num_layers)]
    yield from (pair for pair in pairs if pair not in held)
    yield from (pair for pair in pairs if pair in held)
