"""For how long to try hostile inputs, from which seed, and where those stay that have found
something: seconds with the same seed in CI, `make fuzz MINUTES=60` with a fresh one."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
SECONDS_IN_CI = 3.0
MEMORY_GROWTH_MAX_MB = 300.0
INPUT_TIMEOUT_S = 10.0


class Fuzzing:
    """The inputs of one target. `corpus` are those that are kept: each has found a fault once, or
    reaches what chance seldom does."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.seed = int(os.environ.get("STARFISH_FUZZ_SEED", "0"))
        self.rng = random.Random(f"{target} {self.seed}")
        self._seconds = float(os.environ.get("STARFISH_FUZZ_SECONDS", str(SECONDS_IN_CI)))
        self._folder = CORPUS / target
        self.num_inputs = 0
        self._slowest_s = 0.0

    def corpus(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self._folder.glob("*.input"))]

    def rounds(self) -> Iterator[int]:
        """Ends when the time is over, and says what has been tried. Fails if memory has grown
        without end meanwhile."""
        began, before_mb = time.monotonic(), _peak_mb()
        while time.monotonic() < began + self._seconds:
            yield self.num_inputs
            self.num_inputs += 1
        grown_mb = _peak_mb() - before_mb
        print(
            f"\n{self._target}: seed {self.seed}, {self.num_inputs} inputs in "
            f"{self._seconds:.0f} s, slowest {self._slowest_s:.2f} s, memory +{grown_mb:.0f} MB"
        )
        assert grown_mb < MEMORY_GROWTH_MAX_MB, f"{grown_mb:.0f} MB more than at first"

    @contextmanager
    def kept_on_failure(self, data: bytes) -> Iterator[None]:
        """The input joins the corpus if the body fails or takes too long."""
        began = time.monotonic()
        try:
            yield
            took_s = time.monotonic() - began
            self._slowest_s = max(self._slowest_s, took_s)
            assert took_s < INPUT_TIMEOUT_S, f"an input of {len(data)} bytes took {took_s:.1f} s"
        except BaseException:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{hashlib.sha256(data).hexdigest()[:16]}.input"
            path.write_bytes(data)
            print(f"kept as {path} (STARFISH_FUZZ_SEED={self.seed})")
            raise


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
