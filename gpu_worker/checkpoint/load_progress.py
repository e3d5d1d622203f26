"""The progress of reading a checkpoint: bytes and rate, logged now and then. Reads nothing
itself."""

from __future__ import annotations

import structlog

from shared.clock import Clock

log = structlog.get_logger()

LOG_EVERY_S = 5.0
GB = 1e9


class LoadProgress:
    """Counts the reads of a `Checkpoint`. Any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._num_tensors = 0
        self._num_bytes = 0
        self.restart()

    def restart(self) -> None:
        """Resets the counts, before another load."""
        self._began_at = self._logged_at = self._clock.now()
        self._num_tensors = self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Implements `checkpoint.OnRead`."""
        self._num_tensors += 1
        self._num_bytes += num_bytes
        if self._clock.now() - self._logged_at >= LOG_EVERY_S:
            self._logged_at = self._clock.now()
            log.info("weights_read", **self.log_fields())

    def log_fields(self) -> dict[str, float]:
        """Fields for a log line."""
        took_s = max(self._clock.now() - self._began_at, 1e-9)
        return {
            "tensors": self._num_tensors,
            "gb": round(self._num_bytes / GB, 3),
            "gb_per_s": round(self._num_bytes / GB / took_s, 2),
        }
