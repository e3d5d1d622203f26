"""The shape of a model, read from a Hugging Face `config.json`: what the planner, the gateway and
the rank each need to know before any weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a mixture-of-experts decoder. `moe_layers` are the decoder layers that have experts,
    in order: the layer axis of a placement indexes this tuple."""

    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    vocab_size: int
    context_tokens_max: int
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any]

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)


SUPPORTED_ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def read_model_spec(folder: Path) -> ModelSpec:
    """Raises CheckpointError where the folder or its config.json is missing, malformed, or of an
    architecture that Starfish does not serve."""
    config = read_json(folder, "config.json")
    architectures = config.get("architectures") or [None]
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(
            f"{folder}: architecture {architectures[0]!r} is not served; "
            f"known: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    try:
        num_layers = int(config["num_hidden_layers"])
        dense = set(config.get("mlp_only_layers") or [])
        sparse_step = int(config.get("decoder_sparse_step", 1))
        return ModelSpec(
            architecture=architectures[0],
            num_layers=num_layers,
            moe_layers=tuple(
                layer
                for layer in range(num_layers)
                if layer not in dense and (layer + 1) % sparse_step == 0
            ),
            hidden_size=int(config["hidden_size"]),
            num_experts=int(config["num_experts"]),
            top_k=int(config["num_experts_per_tok"]),
            moe_intermediate_size=int(config["moe_intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            context_tokens_max=int(config["max_position_embeddings"]),
            eos_token_ids=_eos_token_ids(folder, config),
            raw=config,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: missing or malformed {error}") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint folder. Raises CheckpointError."""
    path = folder / name
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --model wants a Hugging Face checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json wins over config.json, as in transformers."""
    eos = config.get("eos_token_id")
    if (folder / "generation_config.json").exists():
        eos = read_json(folder, "generation_config.json").get("eos_token_id", eos)
    if eos is None:
        return ()
    return tuple(int(e) for e in eos) if isinstance(eos, list) else (int(eos),)
