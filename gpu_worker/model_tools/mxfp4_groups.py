"""MXFP4 as gpt-oss publishes it, for checkpoints that are made here: which tensors it takes, and
the codes and scales of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.quantisation import MXFP4_GROUP

CODES = torch.float4_e2m1fn_x2
"""What a checkpoint in this format is asked for by. Its tensors are bytes."""
CONFIG: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""The entry `quantization_config` of config.json."""

_GROUPED_SIZES = ("hidden_size", "intermediate_size")
_BETWEEN_MAGNITUDES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_LARGEST_EXPONENT = 2  # of a code
_SCALE_BIAS = 127
_SIGN = 8


def with_whole_groups(config: dict[str, Any]) -> dict[str, Any]:
    """With the sizes of experts rounded up to whole groups."""
    sizes = {name: -(-config[name] // MXFP4_GROUP) * MXFP4_GROUP for name in _GROUPED_SIZES}
    return config | sizes


def is_quantised(name: str) -> bool:
    """Only the matrices of experts."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def blocks_name(name: str) -> str:
    return f"{name}_blocks"


def scales_name(name: str) -> str:
    return f"{name}_scales"


def scales_shape(shape: Shape) -> Shape:
    """`[E, outputs, groups]` for `[E, inputs, outputs]`."""
    num_experts, inputs, outputs = shape
    return num_experts, outputs, inputs // MXFP4_GROUP


def blocks_shape(shape: Shape) -> Shape:
    """Of bytes, with two codes each."""
    return *scales_shape(shape), MXFP4_GROUP // 2


def quantise(values_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales, uint8. A group's scale puts its largest value between 4 and 8 times two to
    the scale's power; what is above 6 becomes 6, and everything else is rounded to the nearest."""
    shape = (*scales_shape(tuple(values_EIO.shape)), MXFP4_GROUP)
    groups = values_EIO.transpose(1, 2).reshape(shape)
    _, above = torch.frexp(groups.abs().amax(dim=-1))  # the largest is from 1/2 to 1 times 2 to it
    exponents = (above - 1 - _LARGEST_EXPONENT).clamp_min(-_SCALE_BIAS)
    scaled = torch.ldexp(groups, -exponents[..., None])
    between = torch.tensor(_BETWEEN_MAGNITUDES)
    codes = torch.bucketize(scaled.abs().contiguous(), between) + _SIGN * (scaled < 0)
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponents + _SCALE_BIAS).to(torch.uint8)
