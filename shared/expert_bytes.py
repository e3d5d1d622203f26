"""How many bytes one expert takes in a slot, by the number format that a model's config.json
names."""

from __future__ import annotations

from shared.model_spec import ModelSpec

_WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
_BLOCK = 128
"""Of the block-scaled FP8 that ranks on cards keep as it is."""
_SCALE_BYTES = 4


def expert_bytes(spec: ModelSpec) -> int:
    """Of the gate, up and down projections, as ranks on cards hold them: in the checkpoint's
    format, with FP8 in blocks of another size and formats of other kinds widened on load. 0 for a
    dense model. (CPU ranks hold float32.)"""
    hidden, inner = spec.hidden_size, spec.moe_intermediate_size
    if _keeps_fp8(spec):
        return 3 * (hidden * inner + _SCALE_BYTES * _blocks(hidden) * _blocks(inner))
    dtype = str(spec.raw.get("dtype") or spec.raw.get("torch_dtype") or "bfloat16")
    return 3 * hidden * inner * _WEIGHT_BYTES.get(dtype, 2)


def _keeps_fp8(spec: ModelSpec) -> bool:
    quantisation = spec.raw.get("quantization_config") or {}
    return (
        isinstance(quantisation, dict)
        and quantisation.get("quant_method") == "fp8"
        and quantisation.get("weight_block_size") == [_BLOCK, _BLOCK]
    )


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)
