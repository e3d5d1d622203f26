"""Loads assigned experts into slots, off the event loop, and says how far it is."""

from __future__ import annotations

import structlog

from gpu_worker.model.expert_slots import ExpertSlots
from shared.expert_map import Placement

log = structlog.get_logger()

PROGRESS_EVERY = 64


class ExpertSlotLoader:
    """Implements `membership.driver.SlotLoader`."""

    def __init__(self, slots: ExpertSlots) -> None:
        self._slots = slots

    def load(self, wanted: Placement) -> Placement:
        def progress(done: int, total: int) -> None:
            if done == total or done % PROGRESS_EVERY == 0:
                log.info("experts_loaded", done=done, total=total)

        self._slots.load_all(wanted, progress)
        return self._slots.contents
