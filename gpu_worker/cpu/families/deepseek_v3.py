"""DeepSeek-V3 and R1: latent attention, sigmoid routing with a correction and groups, shared
experts, dense layers first."""

from __future__ import annotations

from gpu_worker.cpu.mla_family import MlaFamily


class DeepseekV3(MlaFamily):
    pass


FAMILY = DeepseekV3
