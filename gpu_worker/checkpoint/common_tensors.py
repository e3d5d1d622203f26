"""What the checkpoints of all families have in common: the names and shapes of the tensors outside
attention and MLPs, and how an unsupported config is refused."""

from __future__ import annotations

from gpu_worker.checkpoint.checkpoint import Shape
from gpu_worker.checkpoint.tied_head import EMBEDDING_NAME, HEAD_NAME
from shared.errors import CheckpointError
from shared.model_spec import ModelSpec

FINAL_NORM_NAME = "model.norm.weight"


def head_name(spec: ModelSpec) -> str:
    return EMBEDDING_NAME if spec.raw.get("tie_word_embeddings", False) else HEAD_NAME


def common_tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shapes of the embedding, the head, and every norm over the hidden state in `spec.layers`."""
    shapes: dict[str, Shape] = {
        EMBEDDING_NAME: (spec.vocab_size, spec.hidden_size),
        FINAL_NORM_NAME: (spec.hidden_size,),
        head_name(spec): (spec.vocab_size, spec.hidden_size),
    }
    for layer in spec.layers:
        for name in ("input", "post_attention"):
            shapes[f"model.layers.{layer}.{name}_layernorm.weight"] = (spec.hidden_size,)
    return shapes


def dense_size(spec: ModelSpec) -> int:
    """Inner size of a dense layer's MLP. Raises CheckpointError."""
    try:
        return int(spec.raw["intermediate_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: missing or malformed {error}") from error


def read_layer_types(spec: ModelSpec, served: tuple[str, ...]) -> list[str] | None:
    """The kind of each layer's attention; None if the config leaves it to the family. Raises
    CheckpointError if one is not in `served`."""
    kinds = spec.raw.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) < spec.num_layers:
        raise CheckpointError("config.json: layer_types must list a kind for each layer")
    for kind in kinds[: spec.num_layers]:
        if kind not in served:
            raise CheckpointError(
                f"config.json asks for layers of {kind!r:.60}, which Starfish does not serve for "
                "this model"
            )
    return kinds


def raise_if_unsupported(spec: ModelSpec, reasons: dict[str, bool]) -> None:
    """Raises CheckpointError for the first reason that applies, or if top-k exceeds the number of
    experts."""
    too_many = {f"top-{spec.top_k} of {spec.num_experts} experts": spec.top_k > spec.num_experts}
    for reason, applies in (reasons | too_many).items():
        if applies:
            raise CheckpointError(f"config.json asks for {reason}, which Starfish does not serve")
