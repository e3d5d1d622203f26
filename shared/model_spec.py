"""The sizes of a model, read from a Hugging Face `config.json`, for the planner, the gateway and
the ranks. No weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.config_defaults import NUM_EXPERTS, complete_config
from shared.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a decoder. `moe_layers` are the decoder layers that have experts, in order; the
    layer axis of a placement indexes this tuple. A dense model has none, and placement treats it as
    one layer with one expert of size 0.

    `draft_layers` are those that propose tokens for speculative decoding, if it is on: they follow
    the decoder's `num_layers`, have experts as well, and so belong to `moe_layers`, too."""

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
    draft_layers: tuple[int, ...] = ()

    @property
    def layers(self) -> range:
        """Those of the decoder, then those that draft."""
        return range(self.num_layers + len(self.draft_layers))

    @property
    def num_moe_layers(self) -> int:
        return max(1, len(self.moe_layers))


ARCHITECTURES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GptOssForCausalLM": "gpt_oss",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""The registry of models: the architecture that config.json names, and the file in
`gpu_worker/cpu/families` that serves it."""

NUM_DRAFT_LAYERS = "num_nextn_predict_layers"
"""In config.json: how many layers of multi-token prediction follow the decoder's."""

_DRAFTING = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "Glm4MoeForCausalLM")

_EXPERT_SIZE = ("moe_intermediate_size", "intermediate_size")
"""Different families' names for the same value. The first that is present counts."""


def read_model_spec(folder: Path) -> ModelSpec:
    """Raises CheckpointError if the folder or its config.json is missing or malformed, or if
    Starfish does not serve the architecture or a key."""
    config = read_json(folder, "config.json")
    architectures = config.get("architectures") or [None]
    if architectures[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{folder}: architecture {architectures[0]!r} is not served; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    config = complete_config(architectures[0], config)
    try:
        num_experts = int(_first_of(config, NUM_EXPERTS) or 0)
        return ModelSpec(
            architecture=architectures[0],
            num_layers=int(config["num_hidden_layers"]),
            moe_layers=_moe_layers(config) if num_experts else (),
            hidden_size=int(config["hidden_size"]),
            num_experts=max(1, num_experts),
            top_k=int(config["num_experts_per_tok"]) if num_experts else 1,
            moe_intermediate_size=int(_first_of(config, _EXPERT_SIZE)) if num_experts else 0,
            vocab_size=int(config["vocab_size"]),
            context_tokens_max=int(config["max_position_embeddings"]),
            eos_token_ids=_eos_token_ids(folder, config),
            raw=config,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: missing or malformed {error}") from error


def with_drafts(spec: ModelSpec, speculative_tokens: int) -> ModelSpec:
    """The model with what drafts so many tokens a step for it: its layer of multi-token prediction.
    Raises CheckpointError if it has none, or if that is not served."""
    if not speculative_tokens:
        return spec
    if spec.architecture not in _DRAFTING or not spec.raw.get(NUM_DRAFT_LAYERS):
        raise CheckpointError(
            "speculative decoding needs a layer of multi-token prediction, which this checkpoint "
            f"({spec.architecture}) does not have: leave out --speculative-tokens"
        )
    if not spec.moe_layers:
        raise CheckpointError("speculative decoding is not served for models without experts")
    layer = spec.num_layers
    return replace(spec, draft_layers=(layer,), moe_layers=(*spec.moe_layers, layer))


def _first_of(config: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _moe_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """All layers, except those that one of the families' settings excludes."""
    num_layers = int(config["num_hidden_layers"])
    if (kinds := config.get("mlp_layer_types")) is not None:
        if len(kinds) < num_layers:
            raise ValueError("mlp_layer_types, which must name a kind for each layer")
        return tuple(layer for layer in range(num_layers) if kinds[layer] == "sparse")
    dense = set(config.get("mlp_only_layers") or [])
    first = int(config.get("first_k_dense_replace") or 0)
    step = int(config.get("decoder_sparse_step") or 1)
    frequency = int(config.get("moe_layer_freq") or 1)
    return tuple(
        layer
        for layer in range(first, num_layers)
        if layer not in dense and (layer + 1) % step == 0 and layer % frequency == 0
    )


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
    """generation_config.json overrides config.json, as in transformers."""
    eos = config.get("eos_token_id")
    if (folder / "generation_config.json").exists():
        eos = read_json(folder, "generation_config.json").get("eos_token_id", eos)
    if eos is None:
        return ()
    return tuple(int(e) for e in eos) if isinstance(eos, list) else (int(eos),)
