"""Loads assigned experts into a CUDA rank's slots, off the event loop and beside decode. An expert
comes from the host's pinned copies if it is there, and from the checkpoint otherwise; then a copy
is made of it.

What has arrived in a slot is compared with the checksum of what was read from the checkpoint. If a
copy was damaged since, or on its way, the expert is read from the checkpoint again; the slot is
told to hold it only when all is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cuda.experts.checksum import checksum_of
from gpu_worker.cuda.experts.expert_reader import ExpertSource
from gpu_worker.cuda.experts.slots import SlotAssignment, SlotUpload
from gpu_worker.cuda.weights.pinned_memory import pinned
from shared.errors import CheckpointError
from shared.expert_map import Placement

log = structlog.get_logger()

PROGRESS_EVERY = 64
NUM_READERS = 4
"""Threads that read the checkpoint, each into pinned memory for one expert. One alone is slower
than the link."""


class LoadableSlots(Protocol):
    """See `slots.CudaSlots`."""

    @property
    def contents(self) -> NDArray[np.int16]: ...

    def begin_load(self, wanted_LS: NDArray[np.int16]) -> list[SlotAssignment]: ...

    def load(self, uploads: Sequence[SlotUpload]) -> list[SlotUpload]: ...


class ExpertCopies(Protocol):
    """See `host_experts.HostExperts`."""

    def cached_values(self, layer: int, expert: int) -> Tensor | None: ...

    def cache_expert(self, layer: int, expert: int) -> Tensor | None: ...

    def checksum(self, layer: int, expert: int) -> int: ...

    def reject(self, layer: int, expert: int) -> None: ...

    def fill_in_background(self) -> None: ...

    def pause(self) -> None: ...


class _Loaded(NamedTuple):
    num: int
    from_host: int  # of them


class CudaSlotLoader:
    """Implements `membership_driver.SlotLoader`. `progress` counts the bytes that come from the
    checkpoint and from the copies."""

    def __init__(
        self,
        *,
        slots: LoadableSlots,
        reader: ExpertSource,
        host_experts: ExpertCopies,
        progress: LoadProgress,
        staging: Sequence[Tensor],
        open_readers: Callable[[], Executor],
    ) -> None:
        """`staging`: for each reader flat memory for one expert, pinned or the copy blocks.
        `open_readers` gives an executor with as many threads, for one load."""
        self._slots = slots
        self._reader = reader
        self._host_experts = host_experts
        self._progress = progress
        self._open_readers = open_readers
        self._num_rejected = 0
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for buffer in staging:
            self._free.put(buffer)

    def load(self, wanted: Placement) -> Placement:
        self._host_experts.pause()
        self._progress.restart()
        try:
            self._fill(self._slots.begin_load(wanted))
        finally:
            self._host_experts.fill_in_background()
        return self._slots.contents

    def _fill(self, assignments: Sequence[SlotAssignment]) -> None:
        here, elsewhere = self._find_cached(assignments)
        loaded = said = from_host = 0
        for part in itertools.chain(self._load_cached(here), self._load_missing(elsewhere)):
            loaded += part.num
            from_host += part.from_host
            if loaded == len(assignments) or loaded - said >= PROGRESS_EVERY:
                said = loaded
                log.info(
                    "experts_loaded",
                    done=loaded,
                    total=len(assignments),
                    from_host=from_host,
                    **self._progress.log_fields(),
                )

    def _find_cached(
        self, assignments: Sequence[SlotAssignment]
    ) -> tuple[list[SlotUpload], list[SlotAssignment]]:
        here, elsewhere = [], []
        for assignment in assignments:
            values = self._host_experts.cached_values(assignment.layer, assignment.expert)
            if values is None:
                elsewhere.append(assignment)
            else:
                here.append(self._upload_of_copy(assignment, values))
        return here, elsewhere

    def _load_cached(self, uploads: Sequence[SlotUpload]) -> Iterator[_Loaded]:
        for first in range(0, len(uploads), PROGRESS_EVERY):
            batch = uploads[first : first + PROGRESS_EVERY]
            damaged = self._slots.load(batch)
            for upload in damaged:
                self._replace_damaged(SlotAssignment(upload.layer, upload.slot, upload.expert))
            for _ in batch[len(damaged) :]:
                self._progress.count(self._reader.form.num_bytes)
            yield _Loaded(len(batch), len(batch) - len(damaged))

    def _load_missing(self, assignments: Sequence[SlotAssignment]) -> Iterator[_Loaded]:
        """Raises CheckpointError; experts loaded before stay."""
        with self._open_readers() as pool:
            futures = [pool.submit(self._load_one, assignment) for assignment in assignments]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _load_one(self, assignment: SlotAssignment) -> _Loaded:
        """From a copy that another rank has made meanwhile, or from one that is made now for all
        ranks of the host."""
        made = self._host_experts.cached_values(assignment.layer, assignment.expert)
        from_host = made is not None
        if from_host:
            self._progress.count(self._reader.form.num_bytes)
        else:
            made = self._host_experts.cache_expert(assignment.layer, assignment.expert)
        if made is None:
            self._load_through_staging(assignment)
        elif self._slots.load([self._upload_of_copy(assignment, made)]):
            self._replace_damaged(assignment)
            from_host = False
        return _Loaded(1, int(from_host))

    def _upload_of_copy(self, assignment: SlotAssignment, values: Tensor) -> SlotUpload:
        known = self._host_experts.checksum(assignment.layer, assignment.expert)
        return SlotUpload(*assignment, values, known)

    def _replace_damaged(self, assignment: SlotAssignment) -> None:
        self._num_rejected += 1
        log.error(
            "expert_copy_damaged",
            layer=assignment.layer,
            expert=assignment.expert,
            so_far=self._num_rejected,
        )
        self._host_experts.reject(assignment.layer, assignment.expert)
        self._load_through_staging(assignment)

    def _load_through_staging(self, assignment: SlotAssignment) -> None:
        """Raises CheckpointError, also if twice something else has arrived in the slot than what
        was read."""
        staging = self._free.get()
        try:
            for _ in range(2):
                self._reader.read(assignment.layer, assignment.expert, staging)
                upload = SlotUpload(*assignment, staging, checksum_of(staging, self._reader.form))
                if not self._slots.load([upload]):
                    return
        finally:
            self._free.put(staging)
        raise CheckpointError(
            f"expert {assignment.expert} of MoE layer {assignment.layer} was damaged twice on its "
            "way into its slot: this machine's memory, link or card is at fault"
        )


def open_slot_loader(
    *,
    slots: LoadableSlots,
    reader: ExpertSource,
    host_experts: ExpertCopies,
    progress: LoadProgress,
    device: torch.device,
    num_readers: int = NUM_READERS,
) -> CudaSlotLoader:
    """Pins memory for `num_readers` experts, for copies to `device`."""
    form = reader.form
    return CudaSlotLoader(
        slots=slots,
        reader=reader,
        host_experts=host_experts,
        progress=progress,
        staging=[pinned(form.num_values, form.flat_dtype, device) for _ in range(num_readers)],
        open_readers=lambda: ThreadPoolExecutor(num_readers),
    )
