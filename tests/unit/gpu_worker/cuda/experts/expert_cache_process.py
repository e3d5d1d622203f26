"""A process that fills copies of experts in memory that it inherits:
`python expert_cache_process.py FD FOLDER STUCK_AT`. It prints what it does on its standard output.
At read number STUCK_AT (0: never) it writes half an expert and hangs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.cuda.experts.expert_reader import ExpertReader
from gpu_worker.cuda.experts.host_experts import open_host_experts
from shared.expert_cache_memory import ExpertCacheMemory
from shared.logs import configure_logs
from tests.unit.gpu_worker.cuda.experts.expert_folder import header_of, open_experts


class StuckReader(ExpertReader):
    def __init__(self, reader: ExpertReader, stuck_at: int) -> None:
        self.__dict__.update(reader.__dict__)
        self._stuck_at, self.num_reads = stuck_at, 0

    def read(self, layer: int, expert: int, out_N: Tensor) -> None:
        self.num_reads += 1
        if self.num_reads == self._stuck_at:
            out_N[: self.form.num_values // 2] = 9.0
            print("stuck", layer, expert, flush=True)
            while True:
                signal.pause()
        super().read(layer, expert, out_N)


def main() -> None:
    configure_logs(service="rank")  # off the standard output
    fd, folder, stuck_at = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    reader = StuckReader(open_experts(folder, torch.float32), stuck_at)
    memory = ExpertCacheMemory(fd=fd, bytes_max=os.fstat(fd).st_size)
    copies = open_host_experts(reader, memory, header_of(folder, reader))
    copies.fill_in_background()
    copies.wait_until_filled(timeout_s=60)
    print("read", reader.num_reads, flush=True)


if __name__ == "__main__":
    main()
