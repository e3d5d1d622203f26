"""The model that this gateway serves: its name, tokenizer and limits, known once the spec is."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path

from gateway.cluster_view import ClusterView
from gateway.detokenizer import TokenNames
from gateway.parsers.formats import AUTO, OutputFormats, choose_formats
from gateway.tokenizer import ModelTokenizer
from gateway.tokenizer_loader import TokenizerOptions, load_tokenizer
from shared.clock import Clock
from shared.errors import CheckpointError
from shared.model_spec import read_json
from shared.records import InstanceSpec
from shared.version import ANSWERS_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    vocab_size: int
    context_tokens_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserNames:
    """By which parsers the model's answers are read."""

    tool_calls: str = AUTO
    reasoning: str = AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`names` are what clients may ask for; answers name the first. `formats` are those of its
    calls and reasoning. `parsed_names` show the special tokens that their parsers read."""

    names: tuple[str, ...]
    tokenizer: ModelTokenizer
    spec: InstanceSpec
    created: int
    tokenizer_file: Path
    formats: OutputFormats
    parsed_names: TokenNames

    def token_names(self, *, with_special: bool, parsed: bool) -> TokenNames:
        """`with_special`: all special tokens appear in texts; `parsed`: those that parsers read."""
        if parsed and not with_special:
            return self.parsed_names
        return self.tokenizer.names(with_special=with_special)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`. With the same one, the same request gives the same answer:
        it stands for the weights and for the arithmetic of the release."""
        system = f"{self.spec.weights}/{ANSWERS_VERSION}"
        return "fp_" + hashlib.sha256(system.encode()).hexdigest()[:16]

    def limits(self, view: ClusterView) -> ModelLimits:
        return ModelLimits(
            vocab_size=self.spec.vocab_size,
            context_tokens_max=min(self.spec.context_tokens_max, view.kv_tokens_min),
        )


async def load_served_model(
    spec: InstanceSpec,
    *,
    folder: Path | None,
    name: str,
    clock: Clock,
    tokenizer_options: TokenizerOptions,
    parsers: ParserNames,
) -> ServedModel:
    """A `folder` or a `name` (several, separated by commas) replaces the spec's. Raises
    CheckpointError."""
    folder = folder or Path(spec.model_path)
    tokenizer = await asyncio.to_thread(load_tokenizer, folder, clock, tokenizer_options)
    if tokenizer.num_ids > spec.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.num_ids} token ids, but the model has only "
            f"{spec.vocab_size}; pass the checkpoint of this instance as --model"
        )
    formats = choose_formats(
        template=tokenizer.template_source,
        model_type=_model_type(folder),
        tool_parser=parsers.tool_calls,
        reasoning_parser=parsers.reasoning,
    )
    names = tuple(part.strip() for part in name.split(",") if part.strip())
    return ServedModel(
        names=names or (spec.model_name,),
        tokenizer=tokenizer,
        spec=spec,
        created=int(clock.wall()),
        tokenizer_file=folder / "tokenizer.json",
        formats=formats,
        parsed_names=tokenizer.names_showing(formats.markers()),
    )


def _model_type(folder: Path) -> str:
    """Empty for a folder that holds only a tokenizer."""
    has_config = (folder / "config.json").exists()
    return str(read_json(folder, "config.json").get("model_type", "")) if has_config else ""
