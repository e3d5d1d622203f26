"""Python's cyclic garbage collector in a process that must not pause, or that times others."""

from __future__ import annotations

import gc


def freeze_loaded_objects() -> None:
    """Once all is loaded that stays: later collections look at what is made from now on alone. A
    full one over everything that libraries bring takes 0.1 to 0.3 s, and holds up every peer of a
    rank that it meets in a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
