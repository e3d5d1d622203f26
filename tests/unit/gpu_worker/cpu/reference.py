"""Seeded checkpoints of every family, in the variants that configs have, and the logits that
transformers has for them."""

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

from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from gpu_worker.model_tools.seeded_configs import SEEDED_CONFIGS
from tests.unit.gpu_worker.cpu.runs import SMALL

VOCAB = SEEDED_CONFIGS["mixtral"]["vocab_size"]
YARN = SEEDED_CONFIGS["gpt_oss"]["rope_parameters"] | {"original_max_position_embeddings": 32}

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "deepseek_v3_defaults": ("rms_norm_eps", "rope_interleave", "hidden_act", "attention_bias"),
    "glm4_moe_defaults": ("rms_norm_eps", "rope_parameters", "norm_topk_prob", "n_group"),
    "gpt_oss_defaults": ("rope_parameters", "layer_types", "rms_norm_eps", "attention_bias"),
    "mixtral_defaults": ("rope_parameters", "sliding_window", "rms_norm_eps", "hidden_act"),
    "olmoe_defaults": ("rope_parameters", "rms_norm_eps", "norm_topk_prob", "clip_qkv"),
}
"""Keys that the config.json of a variant lacks."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2_lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {
            "rope_parameters": YARN | {"truncate": True, "mscale": 1.0, "mscale_all_dim": 0.8},
            "attention_bias": True,
            "rope_interleave": False,
        },
    ),
    "deepseek_v3_defaults": (
        "deepseek_v3",
        {"rope_scaling": {"type": "yarn", "factor": 8.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v32": ("deepseek_v32", {}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe_defaults": ("glm4_moe", {"n_group": 1}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": YARN}),
    "gpt_oss_defaults": ("gpt_oss", {"sliding_window": 5}),
    # Sizes that MXFP4's blocks of 32 divide.
    "gpt_oss_wide": (
        "gpt_oss",
        {"hidden_size": 64, "num_local_experts": 4, "intermediate_size": 32},
    ),
    "mixtral": ("mixtral", {}),
    "mixtral_defaults": ("mixtral", {"sliding_window": None}),
    "olmoe": ("olmoe", {}),
    "olmoe_defaults": ("olmoe", {}),
    "qwen3": ("qwen3", {"rope_parameters": YARN | {"truncate": True}}),
    "qwen3_moe": ("qwen3_moe", SMALL | {"vocab_size": VOCAB, "mlp_only_layers": [1]}),
}


def save_checkpoint(folder: Path, variant: str, dtype: torch.dtype = torch.float32) -> Path:
    family, changes = VARIANTS[variant]
    create_seeded_checkpoint(folder, 11, num_shards=1, family=family, dtype=dtype, **changes)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    left_out = LEFT_OUT.get(variant, ())
    path.write_text(json.dumps({key: config[key] for key in config if key not in left_out}))
    return folder


def reference_logits(
    folder: Path, tokens: NDArray[np.int32], dtype: torch.dtype = torch.float32
) -> NDArray[np.float32]:
    """`[T, V]`. Its grouped matrix products want rows of 16 bytes; the plain loop takes any."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, loading = getattr(transformers, architecture).from_pretrained(
        folder,
        dtype=dtype,
        experts_implementation="eager",
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(loading.values()), f"not the tensors that it has: {loading}"
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return np.asarray(logits.float().numpy())


def random_tokens(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng((count, seed)).integers(0, VOCAB, count).astype(np.int32)


def add_mtp_layer(folder: Path) -> Path:
    """The layer behind the last one that published checkpoints of DeepSeek and GLM carry: all that
    a layer has, and what joins it to the model."""
    path, raw = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    last, mtp = (f"model.layers.{raw['num_hidden_layers'] - back}" for back in (1, 0))
    tensors = load_file(path)
    hidden_size = raw["hidden_size"]
    extra = {
        name.replace(last, mtp): tensor + 1 for name, tensor in tensors.items() if last in name
    }
    extra |= {
        f"{mtp}.enorm.weight": torch.ones(hidden_size),
        f"{mtp}.hnorm.weight": torch.ones(hidden_size),
        f"{mtp}.eh_proj.weight": torch.ones(hidden_size, 2 * hidden_size),
        f"{mtp}.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1,
        f"{mtp}.shared_head.norm.weight": torch.ones(hidden_size),
        f"{mtp}.shared_head.head.weight": tensors["lm_head.weight"] + 1,
    }
    save_file(tensors | extra, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 1}))
    return folder


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
