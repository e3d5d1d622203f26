"""DeepSeek-V3.2: V3 with sparse attention: an indexer chooses the positions that a row attends
to."""

from __future__ import annotations

from typing import ClassVar

from gpu_worker.cpu.kernels import mla
from gpu_worker.cpu.mla_family import MlaFamily


class DeepseekV32(MlaFamily):
    entry_points: ClassVar = (*MlaFamily.entry_points, *mla.SPARSE_ENTRY_POINTS)
    has_indexer = True


FAMILY = DeepseekV32
