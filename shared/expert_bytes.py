"""How many bytes one expert takes in a slot, by the number format that a model's config.json
names."""

from __future__ import annotations

from typing import Any

from shared.model_spec import ModelSpec

_WEIGHT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
_BLOCK = 128
"""Of the block-scaled FP8 that ranks on cards keep as it is."""
_SCALE_BYTES = 4
_MXFP4_GROUP = 32
"""Inputs that share a scale of one byte. Ranks on cards hold the scales of four groups together."""


def expert_bytes(spec: ModelSpec) -> int:
    """Of the gate, up and down projections, as ranks on cards hold them: in the checkpoint's
    format, block-scaled FP8 or MXFP4, with FP8 in blocks of another size widened on load. 0 for a
    dense model. (CPU ranks hold float32.)"""
    hidden, inner = spec.hidden_size, spec.moe_intermediate_size
    if _keeps_mxfp4(spec):
        words_in, words_out = (_parts(size, 4 * _MXFP4_GROUP) for size in (hidden, inner))
        return 3 * hidden * inner // 2 + 4 * (2 * inner * words_in + hidden * words_out)
    if _keeps_fp8(spec):
        return 3 * (hidden * inner + _SCALE_BYTES * _parts(hidden, _BLOCK) * _parts(inner, _BLOCK))
    dtype = str(spec.raw.get("dtype") or spec.raw.get("torch_dtype") or "bfloat16")
    return 3 * hidden * inner * _WEIGHT_BYTES.get(dtype, 2)


def _keeps_fp8(spec: ModelSpec) -> bool:
    quantisation = _quantisation(spec)
    return quantisation.get("quant_method") == "fp8" and quantisation.get("weight_block_size") == [
        _BLOCK,
        _BLOCK,
    ]


def _keeps_mxfp4(spec: ModelSpec) -> bool:
    sizes = spec.hidden_size, spec.moe_intermediate_size
    is_whole = all(size % _MXFP4_GROUP == 0 for size in sizes)
    return is_whole and _quantisation(spec).get("quant_method") == "mxfp4"


def _quantisation(spec: ModelSpec) -> dict[str, Any]:
    quantisation = spec.raw.get("quantization_config")
    return quantisation if isinstance(quantisation, dict) else {}


def _parts(size: int, part: int) -> int:
    return -(-size // part)
