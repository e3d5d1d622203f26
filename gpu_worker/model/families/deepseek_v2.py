"""DeepSeek-V2: latent attention (the lite one's queries without a latent), softmax routing."""

from __future__ import annotations

from gpu_worker.model.gqa_family import refuse
from gpu_worker.model.mla_family import MlaFamily
from shared.model_spec import ModelSpec


class DeepseekV2(MlaFamily):
    sigmoid_routing = False

    def __init__(self, spec: ModelSpec) -> None:
        method = spec.raw.get("topk_method", "greedy")
        known = method in ("greedy", "group_limited_greedy")
        normed = bool(spec.raw.get("norm_topk_prob", False))
        refuse(spec, {f"routing {method!r}": not known, "normed weights of experts": normed})
        super().__init__(spec)


FAMILY = DeepseekV2
