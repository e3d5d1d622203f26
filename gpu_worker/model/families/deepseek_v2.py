"""DeepSeek-V2: latent attention (the lite one's queries without a latent), softmax routing."""

from __future__ import annotations

from gpu_worker.model.frame import refuse
from gpu_worker.model.mla_family import MlaFamily
from shared.model_spec import ModelSpec


class DeepseekV2(MlaFamily):
    sigmoid_routing = False
    routing_methods = ("greedy", "group_limited_greedy")

    def __init__(self, spec: ModelSpec) -> None:
        normed = bool(spec.raw.get("norm_topk_prob", False))
        refuse(spec, {"normed weights of experts": normed})
        super().__init__(spec)


FAMILY = DeepseekV2
