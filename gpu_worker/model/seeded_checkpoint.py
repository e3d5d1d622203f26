"""Makes a random Qwen3-MoE checkpoint from a seed, in the standard Hugging Face format: the model
that Starfish serves where none is given, and the small ones that tests use.

Its text is nonsense, but hangs on the whole context, as a trained model's does: with plain random
weights a greedy continuation soon repeats one token, and would hide a lost or doubled one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from gpu_worker.model.checkpoint import INDEX_FILE, Shape
from gpu_worker.model.families.qwen3_moe import Qwen3Moe
from gpu_worker.model.seeded_tokenizer import END_OF_TEXT, END_OF_TURN, write_tokenizer
from shared.model_spec import read_model_spec

# Found by trial: of 96 greedy tokens after a prompt 94 to 96 are distinct, and float32 rounding is
# amplified so little that logits agree with other implementations to 6e-5.
_EMBEDDING_STD = 1.0
_QUERY_GAIN = 2.0  # attention picks a few positions in place of averaging all
_EXPERT_GAIN = 4.0  # experts outweigh the embedding: the last token alone decides nothing
_LOGITS_STD = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededSizes:
    """Field names are those of config.json."""

    vocab_size: int = 4096
    num_hidden_layers: int = 8
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 128
    intermediate_size: int = 512
    max_position_embeddings: int = 4096
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = False


def create_seeded_checkpoint(
    folder: Path,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    num_shards: int = 2,
    **sizes: Any,
) -> None:
    """Writes the whole folder aside and renames it; where `folder` appears meanwhile, made by
    another process, that one stays. `sizes` are fields of SeededSizes."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_config(aside, SeededSizes(**sizes))
        _write_weights(aside, seed, num_shards, on_progress)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_config(folder: Path, sizes: SeededSizes) -> None:
    special = write_tokenizer(
        folder, vocab_size=sizes.vocab_size, context_tokens=sizes.max_position_embeddings
    )
    ends = [special[END_OF_TURN], special[END_OF_TEXT]]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_dropout": 0.0,
        "bos_token_id": special[END_OF_TEXT],
        "decoder_sparse_step": 1,
        "eos_token_id": special[END_OF_TURN],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
    } | {name: getattr(sizes, name) for name in SeededSizes.__slots__}
    generation = {
        "bos_token_id": special[END_OF_TEXT],
        "pad_token_id": special[END_OF_TEXT],
        "eos_token_id": ends,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)


def _write_weights(
    folder: Path, seed: int, num_shards: int, on_progress: Callable[[int, int], None] | None
) -> None:
    spec = read_model_spec(folder)
    shapes = Qwen3Moe(spec).tensor_shapes()
    shards = _split(shapes, num_shards)
    weight_map: dict[str, str] = {}
    done = 0
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = _random_tensor(name, shapes[name], seed)
            weight_map[name] = file_name
            done += 1
            if on_progress is not None:
                on_progress(done, len(shapes))
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    total_bytes = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / INDEX_FILE, index_json)


def _split(shapes: dict[str, Shape], num_shards: int) -> list[list[str]]:
    """Names in order, cut where the bytes pass each shard's share."""
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    before = 0
    for name, shape in shapes.items():
        shards[min(before * num_shards // total, num_shards - 1)].append(name)
        before += int(np.prod(shape))
    return [names for names in shards if names]


def _random_tensor(name: str, shape: Shape, seed: int) -> NDArray[np.float32]:
    """A generator of its own per tensor: no tensor's values depend on the others."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values: NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        mean = _QUERY_GAIN if name.endswith("q_norm.weight") else 1.0
        return np.float32(mean) + np.float32(0.1) * values
    if name.endswith(".bias"):
        return np.float32(0.1) * values
    return values * np.float32(_std(name, fan_in=shape[1]))


def _std(name: str, fan_in: int) -> float:
    if name.endswith("embed_tokens.weight"):
        return _EMBEDDING_STD
    gains = {"lm_head.weight": _LOGITS_STD, "down_proj.weight": _EXPERT_GAIN}
    gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
    return gain / math.sqrt(fan_in)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
