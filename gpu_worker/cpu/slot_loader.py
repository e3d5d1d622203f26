"""Loads assigned experts into slots, off the event loop, and logs its progress."""

from __future__ import annotations

import structlog

from gpu_worker.checkpoint.load_progress import LoadProgress
from gpu_worker.cpu.expert_slots import ExpertSlots
from shared.expert_map import Placement

log = structlog.get_logger()

PROGRESS_EVERY = 64


class ExpertSlotLoader:
    """Implements `membership_driver.SlotLoader`. `progress` counts the reads of the slots'
    checkpoint."""

    def __init__(self, slots: ExpertSlots, progress: LoadProgress) -> None:
        self._slots = slots
        self._progress = progress

    def load(self, wanted: Placement) -> Placement:
        def log_progress(done: int, total: int) -> None:
            if done == total or done % PROGRESS_EVERY == 0:
                log.info("experts_loaded", done=done, total=total, **self._progress.log_fields())

        self._progress.restart()
        self._slots.load_all(wanted, log_progress)
        return self._slots.contents
