"""What gpt-oss's config.json says beside the usual sizes, and the tensors of its expert layers.
Knows no kernels."""

from __future__ import annotations

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.common_tensors import raise_if_unsupported, read_layer_types
from shared.model_spec import ModelSpec

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""The activation of experts: `(u + 1) · g · sigmoid(alpha · g)`, with g clamped above and u on both
sides. No other constants are served."""

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_gpt_oss_windows(spec: ModelSpec) -> list[int]:
    """The window of each layer's attention; 0: none. Raises CheckpointError if the config asks for
    what is not served."""
    raw = spec.raw
    alpha, limit = raw.get("swiglu_alpha", SWIGLU_ALPHA), raw.get("swiglu_limit", SWIGLU_LIMIT)
    is_other = (alpha, limit) != (SWIGLU_ALPHA, SWIGLU_LIMIT)
    raise_if_unsupported(spec, {f"swiglu_alpha={alpha} and swiglu_limit={limit}": is_other})
    kinds = read_layer_types(spec, (_SLIDING, _FULL)) or [
        _FULL if layer % 2 else _SLIDING for layer in range(spec.num_layers)
    ]
    window = int(raw.get("sliding_window") or 0)
    return [window if kind == _SLIDING else 0 for kind in kinds[: spec.num_layers]]


def gpt_oss_moe_shapes(spec: ModelSpec, prefix: str) -> dict[str, Shape]:
    """Shapes of the tensors under `prefix` (…mlp)."""
    num_experts, inner_size = spec.num_experts, spec.moe_intermediate_size
    return {
        f"{prefix}.router.weight": (num_experts, spec.hidden_size),
        f"{prefix}.router.bias": (num_experts,),
        f"{prefix}.experts.gate_up_proj": (num_experts, spec.hidden_size, 2 * inner_size),
        f"{prefix}.experts.gate_up_proj_bias": (num_experts, 2 * inner_size),
        f"{prefix}.experts.down_proj": (num_experts, inner_size, spec.hidden_size),
        f"{prefix}.experts.down_proj_bias": (num_experts, spec.hidden_size),
    }
