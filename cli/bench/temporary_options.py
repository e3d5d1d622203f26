"""The options of an instance that a benchmark starts for itself. They become flags of
`starfish up` and environment variables of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from cli.up.model import shipped_model
from shared.errors import ConfigError

_RANK_PREFIX = "STARFISH_RANK_"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporaryInstanceOptions:
    """Without a model the instance serves the reference size, to which the figures in
    docs/benchmarks.md belong."""

    model: Annotated[Path | None, typer.Option(help="With --own: its checkpoint.")] = None
    ranks: Annotated[int, typer.Option(help="With --own: its number of ranks.")] = 4
    device: Annotated[str, typer.Option(help="With --own: cpu, cuda, or auto.")] = "auto"
    redundant_experts: Annotated[
        int,
        typer.Option(help="With --own: extra replicas of experts per layer; -1: one of each."),
    ] = -1
    slots_per_rank: Annotated[
        int,
        typer.Option(help="With --own: expert slots on each rank; 0: as many as are useful."),
    ] = 0
    speculative_tokens: Annotated[
        int,
        typer.Option(help="With --own: tokens that ranks draft, as `starfish up` has it."),
    ] = 0
    rank_options: Annotated[
        list[str],
        typer.Option(
            "--rank-option",
            metavar="NAME=VALUE",
            help="With --own: an option of its ranks; repeatable.",
        ),
    ] = field(default_factory=list)
    start_timeout_s: Annotated[
        float,
        typer.Option(
            "--start-timeout-s", help="With --own: give up if it does not serve within this time."
        ),
    ] = 600.0
    static: bool = False
    cuda_mps: bool = True
    """False: ranks that share a card take turns on it."""

    def check(self) -> None:
        """Raises ConfigError if a rank option is malformed."""
        parse_rank_options(self.rank_options)

    def without_cache(self) -> TemporaryInstanceOptions:
        """The same instance with no prefix cache: it computes every answer whole."""
        return replace(self, rank_options=[*self.rank_options, "prefix_cache=false"])

    def with_shipped_model(self) -> TemporaryInstanceOptions:
        """If none was given: it chats, which the one of the reference size does not. Raises
        ConfigError if the installation has none."""
        if self.model is not None:
            return self
        model = shipped_model()
        if model is None:
            raise ConfigError("no model came with this installation: pass --model FOLDER")
        return replace(self, model=model)

    def flags(self) -> list[str]:
        """For `starfish up`."""
        return [
            *("--device", self.device, "--ranks", str(self.ranks)),
            *("--redundant-experts", str(self.redundant_experts)),
            *("--slots-per-rank", str(self.slots_per_rank)),
            *(("--model", str(self.model)) if self.model is not None else ("--seeded",)),
            *(
                ("--speculative-tokens", str(self.speculative_tokens))
                if self.speculative_tokens
                else ()
            ),
            *(("--static",) if self.static else ()),
            *(() if self.cuda_mps else ("--no-cuda-mps",)),
        ]

    def environment(self) -> dict[str, str]:
        """For the ranks. Raises ConfigError if a rank option is malformed."""
        options = parse_rank_options(self.rank_options)
        return {_RANK_PREFIX + name.upper(): value for name, value in options.items()}


def parse_rank_options(texts: Sequence[str]) -> dict[str, str]:
    """Parses `NAME=VALUE`; names may be spelt as flags or as in the environment, and a later value
    replaces an earlier one. Raises ConfigError."""
    options: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"--rank-option {text}: pass NAME=VALUE, for example kv_tokens=65536")
        options[name.removeprefix("--").replace("-", "_").lower()] = value
    return options
