"""Block-scaled FP8 as DeepSeek and Qwen publish it, for checkpoints that are made here: which
tensors it takes, and the codes and scales of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_worker.checkpoint.checkpoint import Shape

CODES = torch.float8_e4m3fn
BLOCK = 128
CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""The entry `quantization_config` of config.json."""

_CODE_MAX = torch.finfo(CODES).max
_SCALE_MIN = 2.0**-100  # of a block of zeros


def is_quantised(name: str, shape: Shape) -> bool:
    """Embeddings, heads, norms, routers and the weights of an indexer's heads stay as they are."""
    is_projection = "_proj" in name and not name.endswith(".weights_proj.weight")
    return len(shape) == 2 and is_projection and name.endswith(".weight")


def scales_name(name: str) -> str:
    return f"{name}_scale_inv"


def scales_shape(shape: Shape) -> Shape:
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantise(values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[N, K]` and float32 scales, one for each block. The largest value of a block gets the
    largest code."""
    rows, columns = values_NK.shape
    across, deep = scales_shape((rows, columns))
    padded = values_NK.new_zeros(across * BLOCK, deep * BLOCK)
    padded[:rows, :columns] = values_NK
    blocks = padded.view(across, BLOCK, deep, BLOCK)
    scales = (blocks.abs().amax(dim=(1, 3)) / _CODE_MAX).clamp_min(_SCALE_MIN)
    codes = (blocks / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return codes.clamp(-_CODE_MAX, _CODE_MAX).to(CODES), scales
