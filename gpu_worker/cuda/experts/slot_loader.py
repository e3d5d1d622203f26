"""Loads assigned experts into a CUDA rank's slots, off the event loop and beside decode. An expert
comes from the host's copies if it is there, and from the checkpoint otherwise; then a copy is made
of it. From a pinned copy the card reads at the full speed of the link; what is not pinned goes
through a little memory that is.

What has arrived in a slot is compared with the checksum of what was read from the checkpoint. If a
copy was damaged since, or on its way, the expert is read from the checkpoint again; the slot is
told to hold it only when all is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
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
"""Threads that read the checkpoint or the copies, each into pinned memory of its own. One alone is
slower than the link."""
STAGING_BYTES = 2**25
"""Of each reader, or one expert if that is more."""


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

    def is_pinned(self, layer: int, expert: int) -> bool: ...

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
        """`staging`: for each reader memory for as many experts B, `[B, num_values]`, pinned or the
        copy blocks. `open_readers` gives an executor with as many threads, for one load."""
        self._slots = slots
        self._reader = reader
        self._host_experts = host_experts
        self._progress = progress
        self._open_readers = open_readers
        self._num_rejected = 0
        self._num_readers, self._staged_max = len(staging), staging[0].shape[0]
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
        """Raises CheckpointError; experts loaded before stay."""
        loaded = said = from_host = 0
        for part in self._load_parts(assignments):
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

    def _load_parts(self, assignments: Sequence[SlotAssignment]) -> Iterator[_Loaded]:
        """First what has a copy, in batches."""
        pinned: list[SlotAssignment] = []
        staged: list[SlotAssignment] = []
        missing: list[SlotAssignment] = []
        for assignment in assignments:
            layer, expert = assignment.layer, assignment.expert
            if self._host_experts.cached_values(layer, expert) is None:
                missing.append(assignment)
            elif self._host_experts.is_pinned(layer, expert):
                pinned.append(assignment)
            else:
                staged.append(assignment)
        for batch in _batches(pinned, PROGRESS_EVERY):
            yield self._count(self._load_copies(batch, None))
        size = min(self._staged_max, max(1, -(-len(staged) // self._num_readers)))
        with self._open_readers() as pool:
            futures = [pool.submit(self._load_staged, batch) for batch in _batches(staged, size)]
            futures += [pool.submit(self._load_missing, assignment) for assignment in missing]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _load_staged(self, assignments: Sequence[SlotAssignment]) -> _Loaded:
        with self._staging() as staging_BN:
            return self._count(self._load_copies(assignments, staging_BN))

    def _load_missing(self, assignment: SlotAssignment) -> _Loaded:
        """From a copy that another rank has made meanwhile, or from one that is made now for all
        ranks of the host, whose bytes the reader counts."""
        layer, expert = assignment.layer, assignment.expert
        if self._host_experts.cached_values(layer, expert) is not None:
            return self._load_staged([assignment])
        is_copied = self._host_experts.cache_expert(layer, expert) is not None
        with self._staging() as staging_BN:
            if is_copied:
                self._load_copies([assignment], staging_BN)
            else:
                self._load_from_checkpoint(assignment, staging_BN[0])
        return _Loaded(1, 0)

    def _load_copies(
        self, assignments: Sequence[SlotAssignment], staging_BN: Tensor | None
    ) -> _Loaded:
        """From copies, by way of `staging_BN` if it is given."""
        uploads: list[SlotUpload] = []
        rejected: list[SlotAssignment] = []  # by another rank of the host, meanwhile
        for assignment in assignments:
            copy = self._host_experts.cached_values(assignment.layer, assignment.expert)
            if copy is None:
                rejected.append(assignment)
                continue
            if staging_BN is not None:
                copy = staging_BN[len(uploads)].copy_(copy)
            known = self._host_experts.checksum(assignment.layer, assignment.expert)
            uploads.append(SlotUpload(*assignment, copy, known))
        damaged = [SlotAssignment(u.layer, u.slot, u.expert) for u in self._slots.load(uploads)]
        for assignment in damaged:
            self._reject(assignment)
        if again := damaged + rejected:
            with nullcontext(staging_BN) if staging_BN is not None else self._staging() as free_BN:
                for assignment in again:
                    self._load_from_checkpoint(assignment, free_BN[0])
        return _Loaded(len(assignments), len(uploads) - len(damaged))

    def _count(self, loaded: _Loaded) -> _Loaded:
        """What came from copies, expert by expert. The reader counts the rest."""
        for _ in range(loaded.from_host):
            self._progress.count(self._reader.form.num_bytes)
        return loaded

    @contextmanager
    def _staging(self) -> Iterator[Tensor]:
        staging_BN = self._free.get()
        try:
            yield staging_BN
        finally:
            self._free.put(staging_BN)

    def _reject(self, assignment: SlotAssignment) -> None:
        """Its copy is damaged."""
        self._num_rejected += 1
        log.error(
            "expert_copy_damaged",
            layer=assignment.layer,
            expert=assignment.expert,
            so_far=self._num_rejected,
        )
        self._host_experts.reject(assignment.layer, assignment.expert)

    def _load_from_checkpoint(self, assignment: SlotAssignment, staging_N: Tensor) -> None:
        """Raises CheckpointError, also if twice something else has arrived in the slot than what
        was read."""
        for _ in range(2):
            self._reader.read(assignment.layer, assignment.expert, staging_N)
            known = checksum_of(staging_N, self._reader.form)
            if not self._slots.load([SlotUpload(*assignment, staging_N, known)]):
                return
        raise CheckpointError(
            f"expert {assignment.expert} of MoE layer {assignment.layer} was damaged twice on its "
            "way into its slot: this machine's memory, link or card is at fault"
        )


def _batches(
    assignments: Sequence[SlotAssignment], size: int
) -> Iterator[Sequence[SlotAssignment]]:
    for first in range(0, len(assignments), size):
        yield assignments[first : first + size]


def open_slot_loader(
    *,
    slots: LoadableSlots,
    reader: ExpertSource,
    host_experts: ExpertCopies,
    progress: LoadProgress,
    device: torch.device,
    num_readers: int = NUM_READERS,
) -> CudaSlotLoader:
    """Pins memory for each reader, for copies to `device`."""
    form = reader.form
    num_experts = max(1, STAGING_BYTES // form.num_bytes) if form.num_bytes else 1
    return CudaSlotLoader(
        slots=slots,
        reader=reader,
        host_experts=host_experts,
        progress=progress,
        staging=[
            pinned(num_experts * form.num_values, form.flat_dtype, device).view(
                num_experts, form.num_values
            )
            for _ in range(num_readers)
        ],
        open_readers=lambda: ThreadPoolExecutor(num_readers),
    )
