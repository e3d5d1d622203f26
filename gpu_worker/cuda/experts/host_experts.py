"""Copies of experts in host memory. With them an orphan is soon in a slot: no file is read, and
nothing is converted.

What a rank reads for its own slots stays as a copy. Once the rank has its own experts, a thread
fills in the others, together with the host's other ranks, and they stay. That thread does not run
at a lower priority: it sometimes holds the interpreter's lock, which steps need.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial

import structlog
import torch
from torch import Tensor

from gpu_worker.cuda.experts.expert_cache import ExpertCache, ExpertCacheHeader
from gpu_worker.cuda.experts.expert_reader import ExpertSource
from shared.errors import CheckpointError
from shared.expert_cache_memory import ExpertCacheMemory

log = structlog.get_logger()

_GB = 1e9


class HostExperts:
    """May be used by several threads. Layers are MoE layers. A returned copy stays valid until
    `close`. Without a cache there are no copies."""

    def __init__(self, reader: ExpertSource, cache: ExpertCache | None) -> None:
        self._reader = reader
        self._cache = cache
        self._thread: threading.Thread | None = None
        self._may_fill = threading.Event()
        self._closed = False
        self._pinning: threading.Thread | None = None
        self._may_pin = True

    def cached_values(self, layer: int, expert: int) -> Tensor | None:
        """The copy, flat as `SlotUpload.values`; None if it is not complete."""
        if self._cache is None:
            return None
        entry = self._cache.entry_of(layer, expert)
        if entry is None or not self._cache.is_complete(entry):
            return None
        return self._cache.entry_values(entry)

    def is_pinned(self, layer: int, expert: int) -> bool:
        """Whether the card can read the copy at the full speed of the link."""
        entry = None if self._cache is None else self._cache.entry_of(layer, expert)
        return entry is not None and self._cache is not None and self._cache.is_pinned(entry)

    def start_pinning(self, device: torch.device) -> None:
        """Pins copies while the rank starts, on a thread."""
        if self._cache is not None:
            self._pinning = threading.Thread(
                target=self._pin, args=(self._cache, device), name="pin-experts", daemon=True
            )
            self._pinning.start()

    def end_pinning(self) -> None:
        """Before any step, which pinning would delay. The rest stays as it is."""
        self._may_pin = False
        self.wait_until_pinned()

    def wait_until_pinned(self) -> None:
        if self._pinning is not None:
            self._pinning.join()
            self._pinning = None

    def checksum(self, layer: int, expert: int) -> int:
        """Of a copy that the methods here have returned, as it was when it was made."""
        cache, entry = self._entry_of_copy(layer, expert)
        return cache.checksum(entry)

    def reject(self, layer: int, expert: int) -> None:
        """The copy is damaged: no rank of the host gets it any more."""
        cache, entry = self._entry_of_copy(layer, expert)
        cache.reject(entry)

    def cache_expert(self, layer: int, expert: int) -> Tensor | None:
        """Reads the expert from the checkpoint into its cache entry. None if it has no entry,
        another process or thread is filling it, or it was rejected. Raises CheckpointError."""
        if self._cache is None:
            return None
        entry = self._cache.entry_of(layer, expert)
        if entry is None or not self._fill_entry(self._cache, entry, wait=False):
            return None
        return self.cached_values(layer, expert)

    def fill_in_background(self) -> None:
        """Starts filling, or continues after `pause`."""
        self._may_fill.set()
        if self._thread is None and self._cache is not None:
            self._thread = threading.Thread(
                target=self._fill_and_log, args=(self._cache,), name="host-experts", daemon=True
            )
            self._thread.start()

    def pause(self) -> None:
        """Stops filling until `fill_in_background`. The expert that is being read is still
        finished."""
        self._may_fill.clear()

    def wait_until_filled(self, timeout_s: float) -> bool:
        """True if filling has ended or was never started."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """No copy may be in use any more."""
        self._closed = True
        self.end_pinning()
        self._may_fill.set()
        self.wait_until_filled(timeout_s=60)
        if self._cache is not None:
            self._cache.close()

    def _entry_of_copy(self, layer: int, expert: int) -> tuple[ExpertCache, int]:
        assert self._cache is not None, "there are no copies"
        entry = self._cache.entry_of(layer, expert)
        assert entry is not None, f"expert {expert} of layer {layer} has no copy"
        return self._cache, entry

    def _pin(self, cache: ExpertCache, device: torch.device) -> None:
        try:
            cache.pin(device, lambda: self._may_pin)
        except OSError as error:
            log.warning("host_experts_not_pinned", detail=str(error))

    def _fill_and_log(self, cache: ExpertCache) -> None:
        """Copies are optional, so an error is only logged. It occurs again if the expert is
        needed."""
        try:
            self._fill(cache)
        except (CheckpointError, OSError) as error:
            log.warning(
                "host_experts_stopped", detail=str(error), **_log_fields(cache, self._reader)
            )
        else:
            log.info("host_experts_filled", **_log_fields(cache, self._reader))

    def _fill(self, cache: ExpertCache) -> None:
        """Entries that others are filling come last: by then they are complete, or the others have
        died."""
        left: Iterable[int] = range(cache.num_entries)
        for wait in (False, True):
            with_others = []
            for entry in left:
                self._may_fill.wait()
                if self._closed:
                    return
                if not self._fill_entry(cache, entry, wait=wait):
                    with_others.append(entry)
            left = with_others

    def _fill_entry(self, cache: ExpertCache, entry: int, *, wait: bool) -> bool:
        return cache.fill(
            entry, partial(self._reader.read, *cache.layer_and_expert_of(entry)), wait=wait
        )


def open_host_experts(
    reader: ExpertSource,
    memory: ExpertCacheMemory | None,
    header: ExpertCacheHeader,
) -> HostExperts:
    """If the memory holds other experts or the host refuses, no copies are used, and the log says
    why."""
    if memory is None or not reader.form.num_values:
        return HostExperts(reader, None)
    try:
        cache = ExpertCache(memory, header, reader.form)
    except (OSError, ValueError) as error:
        log.warning("host_experts_unused", detail=str(error))
        return HostExperts(reader, None)
    log.info("host_experts_ready", entries=cache.num_entries, **_log_fields(cache, reader))
    return HostExperts(reader, cache)


def _log_fields(cache: ExpertCache, reader: ExpertSource) -> dict[str, float]:
    """Fields for a log line."""
    num = cache.num_complete()
    return {"experts": num, "gb": round(num * reader.form.num_bytes / _GB, 3)}
