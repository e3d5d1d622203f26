"""The tensors that a checkpoint has for its layer of multi-token prediction, besides those of a
decoder layer. Knows no kernels."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gpu_worker.checkpoint.checkpoint import Shape
from shared.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftNames:
    """The names of these tensors in layer `prefix`."""

    prefix: str

    @property
    def token_norm(self) -> str:
        return f"{self.prefix}.enorm.weight"

    @property
    def hidden_norm(self) -> str:
        return f"{self.prefix}.hnorm.weight"

    @property
    def joint(self) -> str:
        """`[H, 2 H]`: applied to the normed embedding, then the normed hidden state."""
        return f"{self.prefix}.eh_proj.weight"

    @property
    def final_norm(self) -> str:
        return f"{self.prefix}.shared_head.norm.weight"

    @property
    def embedding(self) -> str:
        """The decoder's, stored once more. Some checkpoints leave it out."""
        return f"{self.prefix}.embed_tokens.weight"

    @property
    def head(self) -> str:
        """As `embedding`."""
        return f"{self.prefix}.shared_head.head.weight"


def draft_names(spec: ModelSpec) -> DraftNames | None:
    """None if the model drafts nothing."""
    if not spec.draft_layers:
        return None
    (layer,) = spec.draft_layers
    return DraftNames(prefix=f"model.layers.{layer}")


def draft_shapes(spec: ModelSpec, stored: Collection[str] | None = None) -> dict[str, Shape]:
    """Their shapes, by name; without the copies that `stored` lacks. None: with both."""
    names = draft_names(spec)
    if names is None:
        return {}
    hidden, vocabulary = spec.hidden_size, spec.vocab_size
    shapes: dict[str, Shape] = {
        names.token_norm: (hidden,),
        names.hidden_norm: (hidden,),
        names.joint: (hidden, 2 * hidden),
        names.final_norm: (hidden,),
    }
    for name in (names.embedding, names.head):
        if stored is None or name in stored:
            shapes[name] = (vocabulary, hidden)
    return shapes
