"""The model that this gateway serves: its name, tokenizer and limits, known once the spec is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from gateway.cluster_view import ClusterView
from gateway.tokenizer import ModelTokenizer, load_tokenizer
from shared.errors import CheckpointError
from shared.records import InstanceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    vocab_size: int
    context_tokens_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`names` are what clients may ask for; answers name the first."""

    names: tuple[str, ...]
    tokenizer: ModelTokenizer
    spec: InstanceSpec
    created: int
    tokenizer_file: Path

    @property
    def name(self) -> str:
        return self.names[0]

    def limits(self, view: ClusterView) -> ModelLimits:
        return ModelLimits(
            vocab_size=self.spec.vocab_size,
            context_tokens_max=min(self.spec.context_tokens_max, view.kv_tokens_min),
        )


async def load_served_model(
    spec: InstanceSpec, *, folder: Path | None, name: str, created: int
) -> ServedModel:
    """A `folder` or a `name` (several, separated by commas) replaces the spec's. Raises
    CheckpointError."""
    folder = folder or Path(spec.model_path)
    tokenizer = await asyncio.to_thread(load_tokenizer, folder)
    if tokenizer.num_ids > spec.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.num_ids} token ids, but the model has only "
            f"{spec.vocab_size}; pass the checkpoint of this instance as --model"
        )
    names = tuple(part.strip() for part in name.split(",") if part.strip())
    return ServedModel(
        names=names or (spec.model_name,),
        tokenizer=tokenizer,
        spec=spec,
        created=created,
        tokenizer_file=folder / "tokenizer.json",
    )
