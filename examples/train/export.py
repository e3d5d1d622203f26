"""Writes the weights in Hugging Face's layout (bf16 safetensors in shards), and the files around.

python export.py --weights OUT --stage chat --data DATA --to models/starling-14m-a4m
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import Model, ModelConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 9_900_000  # below the size that code hosts warn of, and kind to diffs and clones
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def hugging_face_tensors(model: Model) -> dict[str, Tensor]:
    """Stacked experts become one gate, up and down matrix each, as (out, in)."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if name.endswith("mlp.experts.gate_up"):
            for e, gate_up in enumerate(value):
                gate, up = gate_up.chunk(2, dim=1)
                prefix = f"model.{name.removesuffix('gate_up')}{e}"
                tensors[f"{prefix}.gate_proj.weight"] = gate.T
                tensors[f"{prefix}.up_proj.weight"] = up.T
        elif name.endswith("mlp.experts.down"):
            for e, down in enumerate(value):
                tensors[f"model.{name.removesuffix('down')}{e}.down_proj.weight"] = down.T
        else:
            tensors[f"model.{name}"] = value
    return {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}


def write_weights(model: Model, folder: Path, *, prefix: str) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in hugging_face_tensors(model).items():
        if size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    for number, shard in enumerate(shards, 1):
        name = f"{prefix}-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, str(folder / name), metadata={"format": "pt"})


def read_weights(model: Model, folder: Path, *, prefix: str) -> None:
    """The inverse of `write_weights`, up to the rounding to bf16."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{prefix}-*.safetensors")):
        tensors |= load_file(str(path))
    state = model.state_dict()
    for name in state:
        expert = f"model.{name.rpartition('.')[0]}"
        numbers = range(model.config.num_experts)
        if name.endswith("mlp.experts.gate_up"):
            pair = ("gate_proj", "up_proj")
            found = [
                torch.cat([tensors[f"{expert}.{e}.{part}.weight"].T for part in pair], dim=1)
                for e in numbers
            ]
            state[name] = torch.stack(found).float()
        elif name.endswith("mlp.experts.down"):
            found = [tensors[f"{expert}.{e}.down_proj.weight"].T for e in numbers]
            state[name] = torch.stack(found).float()
        else:
            state[name] = tensors[f"model.{name}"].float()
    model.load_state_dict(state)


def config_json(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size * config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2048,
    "chat_template": CHAT_TEMPLATE,
}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="what train.py wrote")
    parser.add_argument("--stage", default="chat", choices=["base", "chat"])
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for path in sorted(args.weights.glob(f"{args.stage}-*.safetensors")):
        name = path.name.replace(args.stage, "model", 1)
        shutil.copyfile(path, args.to / name)
        with safe_open(str(path), "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (not a dict)
                weight_map[key] = name
                total += shard.get_tensor(key).nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(args.to / "model.safetensors.index.json", index)
    config = ModelConfig(**json.loads((args.weights / "log.json").read_text())[0]["config"])
    write_json(args.to / "config.json", config_json(config))
    write_json(args.to / "generation_config.json", GENERATION)
    write_json(args.to / "tokenizer_config.json", TOKENIZER)
    for name in ("tokenizer.json", "heldout.jsonl"):
        shutil.copyfile(args.data / name, args.to / name)


if __name__ == "__main__":
    main()
