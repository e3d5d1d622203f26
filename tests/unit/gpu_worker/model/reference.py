"""Small checkpoints of every family, saved by transformers itself, and its logits for them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

VOCAB = 211
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_MLA = {
    "intermediate_size": 22,
    "moe_intermediate_size": 10,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # An even size: the reference views pairs as complex numbers.
    "deepseek_v2": (
        "DeepseekV2",
        _MLA | {"qk_nope_head_dim": 8, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        _MLA | {"qk_nope_head_dim": 8, "q_lora_rank": None, "topk_method": "greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", _MLA),
    "deepseek_v3_yarn": (
        "DeepseekV3",
        _MLA
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}}
        | {"attention_bias": True, "rope_interleave": False},
    ),
    # So many heads that no two positions have all of them at zero: among equals the reference
    # chooses as it likes.
    "deepseek_v32": (
        "DeepseekV32",
        _MLA | {"index_n_heads": 17, "index_head_dim": 11, "index_topk": 8},
    ),
    "glm4_moe": (
        "Glm4Moe",
        _GQA
        | {"n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 2}
        | {"topk_group": 1, "moe_intermediate_size": 10, "intermediate_size": 22}
        | {"first_k_dense_replace": 1, "attention_bias": True, "use_qk_norm": True}
        | {"head_dim": 12, "routed_scaling_factor": 1.5},
    ),
    "gpt_oss": (
        "GptOss",
        _GQA
        | {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 14}
        | {"sliding_window": 7, "rope_parameters": YARN | {"truncate": False}}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    # Sizes that MXFP4's blocks of 32 divide.
    "gpt_oss_wide": (
        "GptOss",
        _GQA
        | {"hidden_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"intermediate_size": 32, "sliding_window": 7},
    ),
    "mixtral": (
        "Mixtral",
        _GQA | {"num_local_experts": 6, "intermediate_size": 14, "sliding_window": 9},
    ),
    "olmoe": (
        "Olmoe",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "num_experts": 8}
        | {"num_experts_per_tok": 3, "intermediate_size": 14, "clip_qkv": 1.5},
    ),
    "qwen3": ("Qwen3", _GQA | {"intermediate_size": 22, "rope_parameters": YARN}),
    "qwen3_moe": (
        "Qwen3Moe",
        _GQA
        | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 14}
        | {"intermediate_size": 22, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
}


def save_checkpoint(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Random weights in which every part matters: unit-variance layers, uneven norms, biases."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(_COMMON | sizes | changes))
    torch.manual_seed(11)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {key: _fill(key, value, dtype) for key, value in sorted(load_file(path).items())}
    save_file(tensors, path, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _fill(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    noise = torch.randn(tensor.shape)
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.2 * noise).to(dtype)
    if tensor.ndim == 1 or name.endswith("bias"):
        kept = torch.float32 if "correction_bias" in name else dtype
        return (0.2 * noise).to(kept)
    gain = 3.0 if name == "lm_head.weight" else 1.0
    inputs = tensor.shape[-2] if name.endswith(("gate_up_proj", "down_proj")) else tensor.shape[-1]
    return (noise * gain * (1.0 if "embed" in name else inputs**-0.5)).to(dtype)


def reference_logits(
    folder: Path, tokens: NDArray[np.int32], dtype: torch.dtype = torch.float32
) -> NDArray[np.float32]:
    """`[T, V]`. Its grouped matrix products want rows of 16 bytes; the plain loop takes any."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return np.asarray(logits.float().numpy())


def random_tokens(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng((count, seed)).integers(0, VOCAB, count).astype(np.int32)


def quantise_fp8(plain: Path, folder: Path, block: tuple[int, int]) -> Path:
    """`folder` gets the matrices in e4m3 with scales, `plain` their dequantised values."""
    shutil.copytree(plain, folder)
    stored: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = exact[name] = tensor
        if "_proj" not in name or not name.endswith(".weight"):
            continue
        rows, columns = (-(-size // edge) for size, edge in zip(tensor.shape, block, strict=True))
        scales = torch.empty(rows, columns)
        codes, values = torch.empty_like(tensor), torch.empty_like(tensor)
        for i, j in itertools.product(range(rows), range(columns)):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = tensor[part].abs().max() / 448
            codes[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn).float()
            values[part] = codes[part] * scales[i, j]
        stored[name], exact[name] = codes.to(torch.float8_e4m3fn), values
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, folder / "model.safetensors")
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": list(block),
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


_MXFP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def quantise_mxfp4(plain: Path, folder: Path) -> Path:
    """`folder` gets the experts as published (rows of outputs, two values a byte, the first in the
    low half), `plain` their dequantised values."""
    shutil.copytree(plain, folder)
    stored: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = exact[name] = tensor
            continue
        rows = tensor.transpose(1, 2).unflatten(2, (-1, 32))  # [E, outputs, blocks, 32]
        exponents = rows.abs().amax(-1).div(6).log2().ceil()
        scaled = rows / torch.exp2(exponents)[..., None]
        codes = (scaled[..., None] - _MXFP4_VALUES).abs().argmin(-1).to(torch.uint8)
        stored[f"{name}_blocks"] = codes[..., ::2] | (codes[..., 1::2] << 4)
        stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        values = _MXFP4_VALUES[codes.long()] * torch.exp2(exponents)[..., None]
        exact[name] = values.flatten(2).transpose(1, 2).contiguous()
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors")
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder
