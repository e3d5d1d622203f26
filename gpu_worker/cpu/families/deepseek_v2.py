"""DeepSeek-V2: latent attention (queries of the Lite model have no latent), softmax routing."""

from __future__ import annotations

from gpu_worker.cpu.mla_family import MlaFamily


class DeepseekV2(MlaFamily):
    sigmoid_routing = False


FAMILY = DeepseekV2
