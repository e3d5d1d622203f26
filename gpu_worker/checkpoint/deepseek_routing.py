"""The routing of DeepSeek's expert layers as config.json defines it, and the tensors that a
checkpoint has for such layers. Knows no kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.common_tensors import dense_size, raise_if_unsupported
from gpu_worker.checkpoint.mlp_names import mlp_shapes
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec

_METHODS = {True: ("noaux_tc",), False: ("greedy", "group_limited_greedy")}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekRouting:
    """`sigmoid`: V3's scores, with a correction; else V2's, which are a softmax. The top-k come
    from the `topk_group` best of `num_groups` groups; `factor` scales their weights."""

    sigmoid: bool
    num_groups: int
    topk_group: int
    normalise: bool
    factor: float
    num_shared: int


def read_deepseek_routing(spec: ModelSpec, *, sigmoid: bool) -> DeepseekRouting:
    """Raises CheckpointError if the config is malformed, inconsistent or unsupported."""
    raw = spec.raw
    method = raw.get("topk_method") or _METHODS[sigmoid][0]
    usual = "sigmoid" if sigmoid else "softmax"
    scoring = raw.get("scoring_func") or usual
    normalise = bool(raw.get("norm_topk_prob", sigmoid))
    raise_if_unsupported(
        spec,
        {
            f"routing {method!r} (topk_method)": method not in _METHODS[sigmoid],
            f"routing scores by {scoring!r} (scoring_func)": scoring != usual,
            "normed weights of experts (norm_topk_prob)": normalise and not sigmoid,
        },
    )
    in_groups = method != "greedy"
    try:
        routing = DeepseekRouting(
            sigmoid=sigmoid,
            num_groups=int(_given(raw, "n_group", 1)) if in_groups else 1,
            topk_group=int(_given(raw, "topk_group", 1)) if in_groups else 1,
            normalise=normalise,
            factor=float(_given(raw, "routed_scaling_factor", 1.0)),
            num_shared=int(raw.get("n_shared_experts") or 0),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: malformed {error}") from error
    if not _groups_are_valid(routing, spec):
        raise CheckpointError(
            f"config.json: {spec.top_k} experts from {routing.topk_group} of "
            f"{routing.num_groups} groups of {spec.num_experts} experts cannot be "
            "(num_experts_per_tok, topk_group, n_group)"
        )
    return routing


def _given(raw: Mapping[str, Any], key: str, default: float) -> Any:
    """Null is the default, and 0 is 0."""
    value = raw.get(key)
    return default if value is None else value


def _groups_are_valid(routing: DeepseekRouting, spec: ModelSpec) -> bool:
    if routing.num_groups < 1:
        return False
    size, rest = divmod(spec.num_experts, routing.num_groups)
    if rest or not 1 <= routing.topk_group <= routing.num_groups:
        return False
    counts_by_two = routing.sigmoid and routing.topk_group < routing.num_groups
    return size >= (2 if counts_by_two else 1) and routing.topk_group * size >= spec.top_k


def deepseek_shapes(spec: ModelSpec, routing: DeepseekRouting, layer: int) -> dict[str, Shape]:
    """Shapes of the tensors of a layer's MLP half, dense or with experts."""
    prefix = f"model.layers.{layer}.mlp"
    if layer not in spec.moe_layers:
        return mlp_shapes(prefix, spec.hidden_size, dense_size(spec))
    shapes: dict[str, Shape] = {f"{prefix}.gate.weight": (spec.num_experts, spec.hidden_size)}
    if routing.sigmoid:
        shapes[f"{prefix}.gate.e_score_correction_bias"] = (spec.num_experts,)
    if routing.num_shared:
        shared_size = routing.num_shared * spec.moe_intermediate_size
        shapes |= mlp_shapes(f"{prefix}.shared_experts", spec.hidden_size, shared_size)
    for expert in range(spec.num_experts):
        expert_prefix = f"{prefix}.experts.{expert}"
        shapes |= mlp_shapes(expert_prefix, spec.hidden_size, spec.moe_intermediate_size)
    return shapes
