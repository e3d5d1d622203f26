"""Pinned copies of experts in the host's memory, so that an orphan comes into a slot as fast as the
link allows: no file is read for it, nothing converted.

What a rank reads for its own slots it leaves as copies; a thread fills in the others once the rank
has its own experts, beside those of the host's other ranks, and they stay. That thread is no less
urgent than others to the scheduler: it holds the interpreter's lock now and then, which steps need.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial

import structlog
import torch
from torch import Tensor

from gpu_worker.cuda.experts.expert_cache import ExpertShelf, ShelfLabel
from gpu_worker.cuda.experts.expert_reader import ExpertReader
from shared.errors import CheckpointError
from shared.expert_cache_memory import ShelfMemory

log = structlog.get_logger()

_GB = 1e9


class HostExperts:
    """Layers are MoE layers. May be used by several threads; a copy once given stays valid. Without
    a shelf there are none."""

    def __init__(self, reader: ExpertReader, shelf: ExpertShelf | None) -> None:
        self._reader = reader
        self._shelf = shelf
        self._thread: threading.Thread | None = None
        self._may_fill = threading.Event()
        self._closed = False

    def copy_of(self, layer: int, expert: int) -> Tensor | None:
        """Flat as `Refill.values`, where it is here."""
        if self._shelf is None:
            return None
        place = self._shelf.place_of(layer, expert)
        if place is None or not self._shelf.is_whole(place):
            return None
        return self._shelf.copy(place)

    def make_copy(self, layer: int, expert: int) -> Tensor | None:
        """Reads the checkpoint into its place. None where it has none or another fills it just now.
        Raises CheckpointError."""
        if self._shelf is None:
            return None
        place = self._shelf.place_of(layer, expert)
        if place is None or not self._fill_place(self._shelf, place, wait=False):
            return None
        return self._shelf.copy(place)

    def fill_in_background(self) -> None:
        """Starts or goes on with what it was started with."""
        self._may_fill.set()
        if self._thread is None and self._shelf is not None:
            self._thread = threading.Thread(
                target=self._fill_quietly, args=(self._shelf,), name="host-experts", daemon=True
            )
            self._thread.start()

    def pause(self) -> None:
        """Until `fill_in_background`: at most the expert being read is still finished."""
        self._may_fill.clear()

    def wait_until_filled(self, timeout_s: float) -> bool:
        """Whether nothing more will come from here."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Nobody may use a copy any more."""
        self._closed = True
        self._may_fill.set()
        self.wait_until_filled(timeout_s=60)
        if self._shelf is not None:
            self._shelf.close()

    def _fill_quietly(self, shelf: ExpertShelf) -> None:
        """A copy is a convenience: what prevents it is told, and met again where it matters."""
        try:
            self._fill(shelf)
        except (CheckpointError, OSError) as error:
            log.warning("host_experts_stopped", detail=str(error), **_so_far(shelf, self._reader))
        else:
            log.info("host_experts_filled", **_so_far(shelf, self._reader))

    def _fill(self, shelf: ExpertShelf) -> None:
        """What others fill comes last: by then it is whole, or they have died over it."""
        left: Iterable[int] = range(shelf.num_places)
        for wait in (False, True):
            with_others = []
            for place in left:
                self._may_fill.wait()
                if self._closed:
                    return
                if not self._fill_place(shelf, place, wait=wait):
                    with_others.append(place)
            left = with_others

    def _fill_place(self, shelf: ExpertShelf, place: int, *, wait: bool) -> bool:
        return shelf.fill(place, partial(self._reader.read, *shelf.pair_of(place)), wait=wait)


def open_host_experts(
    reader: ExpertReader, memory: ShelfMemory | None, label: ShelfLabel, device: torch.device
) -> HostExperts:
    """Pinned: while steps run, it would hold them up. None are used, and the log says why, where
    others lie in the memory or the host refuses."""
    if memory is None:
        return HostExperts(reader, None)
    shelf = None
    try:
        shelf = ExpertShelf(memory, label, reader.dtype)
        shelf.pin(device)
    except (OSError, ValueError) as error:
        log.warning("host_experts_unused", detail=str(error))
        if shelf is not None:
            shelf.close()
        return HostExperts(reader, None)
    log.info("host_experts_ready", places=shelf.num_places, **_so_far(shelf, reader))
    return HostExperts(reader, shelf)


def _so_far(shelf: ExpertShelf, reader: ExpertReader) -> dict[str, float]:
    """Fields for a log line."""
    num = shelf.num_whole()
    return {"experts": num, "gb": round(num * reader.num_bytes / _GB, 3)}
