"""What an instance of a benchmark's own is started with: flags of `starfish up`, and options of its
ranks in their environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shared.errors import ConfigError

_RANK_PREFIX = "STARFISH_RANK_"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporaryInstanceOptions:
    """Without a model: the reference size, which the figures in docs/benchmarks.md are of."""

    model: Path | None = None
    ranks: int = 4
    device: str = "auto"
    redundant_experts: int = -1
    slots_per_rank: int = 0
    static: bool = False
    rank_options: Mapping[str, str] = field(default_factory=dict)

    def without_cache(self) -> TemporaryInstanceOptions:
        """Of an instance that computes every answer anew."""
        return replace(self, rank_options={**self.rank_options, "prefix_cache": "false"})

    def flags(self) -> list[str]:
        return [
            *("--device", self.device, "--ranks", str(self.ranks)),
            *("--redundant-experts", str(self.redundant_experts)),
            *("--slots-per-rank", str(self.slots_per_rank)),
            *(("--model", str(self.model)) if self.model is not None else ("--seeded",)),
            *(("--static",) if self.static else ()),
        ]

    def environment(self) -> dict[str, str]:
        return {_RANK_PREFIX + name.upper(): value for name, value in self.rank_options.items()}


def parse_rank_options(texts: Sequence[str]) -> dict[str, str]:
    """Of `NAME=VALUE`, as of a rank's flags or its environment. Raises ConfigError."""
    options: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"--rank-option {text}: say NAME=VALUE, such as kv_tokens=65536")
        options[name.removeprefix("--").replace("-", "_").lower()] = value
    return options
