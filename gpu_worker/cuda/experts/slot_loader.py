"""Loads assigned experts into a CUDA rank's slots, off the event loop and beside decode: from the
host's pinned copies where they are there, else out of the checkpoint, which makes them copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.experts.expert_reader import ExpertReader
from gpu_worker.cuda.experts.host_experts import HostExperts
from gpu_worker.cuda.experts.slots import CudaSlots, Refill, Vacancy
from gpu_worker.cuda.weights.pinned_memory import pinned
from shared.expert_map import Placement

log = structlog.get_logger()

PROGRESS_EVERY = 64
NUM_READERS = 4
"""Threads that read the checkpoint, each into an expert's worth of pinned memory: one alone does
not keep pace with the link."""


class _Loaded(NamedTuple):
    num: int
    from_host: int  # of them


class CudaSlotLoader:
    """Implements `membership.driver.SlotLoader`. `progress` counts what the checkpoint and the
    copies give."""

    def __init__(
        self,
        *,
        slots: CudaSlots,
        reader: ExpertReader,
        copies: HostExperts,
        progress: LoadProgress,
        device: torch.device,
        num_readers: int = NUM_READERS,
    ) -> None:
        self._slots = slots
        self._reader = reader
        self._copies = copies
        self._progress = progress
        self._num_readers = num_readers
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(num_readers):
            self._free.put(pinned(reader.num_values, reader.dtype, device))

    def load(self, wanted: Placement) -> Placement:
        self._copies.pause()
        self._progress.restart()
        try:
            self._fill(self._slots.vacate(wanted))
        finally:
            self._copies.fill_in_background()
        return self._slots.contents

    def _fill(self, vacancies: Sequence[Vacancy]) -> None:
        here, elsewhere = self._find_copies(vacancies)
        loaded = said = from_host = 0
        for part in itertools.chain(self._load_copies(here), self._load_missing(elsewhere)):
            loaded += part.num
            from_host += part.from_host
            if loaded == len(vacancies) or loaded - said >= PROGRESS_EVERY:
                said = loaded
                log.info(
                    "experts_loaded",
                    done=loaded,
                    total=len(vacancies),
                    from_host=from_host,
                    **self._progress.so_far(),
                )

    def _find_copies(self, vacancies: Sequence[Vacancy]) -> tuple[list[Refill], list[Vacancy]]:
        here, elsewhere = [], []
        for vacancy in vacancies:
            values = self._copies.copy_of(vacancy.layer, vacancy.expert)
            if values is None:
                elsewhere.append(vacancy)
            else:
                here.append(Refill(*vacancy, values))
        return here, elsewhere

    def _load_copies(self, refills: Sequence[Refill]) -> Iterator[_Loaded]:
        for first in range(0, len(refills), PROGRESS_EVERY):
            batch = refills[first : first + PROGRESS_EVERY]
            self._slots.load(batch)
            for _ in batch:
                self._progress.count(self._reader.num_bytes)
            yield _Loaded(len(batch), len(batch))

    def _load_missing(self, vacancies: Sequence[Vacancy]) -> Iterator[_Loaded]:
        """Raises CheckpointError; what was loaded before stays."""
        with ThreadPoolExecutor(self._num_readers) as pool:
            futures = [pool.submit(self._load_one, vacancy) for vacancy in vacancies]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _load_one(self, vacancy: Vacancy) -> _Loaded:
        """From a copy that another rank has made meanwhile, or one made now, for all."""
        made = self._copies.copy_of(vacancy.layer, vacancy.expert)
        from_host = made is not None
        if from_host:
            self._progress.count(self._reader.num_bytes)
        else:
            made = self._copies.make_copy(vacancy.layer, vacancy.expert)
        if made is None:
            self._load_through_staging(vacancy)
        else:
            self._slots.load([Refill(*vacancy, made)])
        return _Loaded(1, int(from_host))

    def _load_through_staging(self, vacancy: Vacancy) -> None:
        staging = self._free.get()
        try:
            self._reader.read(vacancy.layer, vacancy.expert, staging)
            self._slots.load([Refill(*vacancy, staging)])
        finally:
            self._free.put(staging)
