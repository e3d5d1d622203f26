"""The options of `starfish bench chaos`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    faults: Annotated[
        str, typer.Option(help="Names of faults, comma-separated (see docs/chaos.md); or all.")
    ] = "all"
    hosts: Annotated[
        int,
        typer.Option(
            help="3: start an instance on three hosts of its own, which are network namespaces "
            "(as root)."
        ),
    ] = 1
    tries: Annotated[int, typer.Option(help="Tries of each fault.")] = 20
    streams: Annotated[int, typer.Option(help="Number of concurrent streams.")] = 16
    num_prompts: Annotated[
        int, typer.Option("--prompts", help="Number of prompts, whose answers are learnt first.")
    ] = 32
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 96
    seed: Annotated[int, typer.Option(help="Chooses prompts and victims.")] = 1
    calm_s: Annotated[float, typer.Option(help="Undisturbed seconds before each try.")] = 2.0
    whole_timeout_s: Annotated[
        float, typer.Option(help="Give the instance up if it is not whole again so long after.")
    ] = 90.0
    time_limit_s: Annotated[
        float, typer.Option(help="Begin no further try after so many seconds.")
    ] = 3600.0
    keep_logs: Annotated[
        Path | None, typer.Option(help="Copy the logs of an instance of its own into this folder.")
    ] = None
    png: Annotated[
        Path | None, typer.Option(help="Write a picture of all gaps between tokens over time.")
    ] = None

    def check(self) -> None:
        """Raises ConfigError."""
        if self.hosts not in (1, 3):
            raise ConfigError(f"--hosts {self.hosts}: pass 1 or 3")
        for flag, value in (
            ("--tries", self.tries),
            ("--streams", self.streams),
            ("--prompts", self.num_prompts),
            ("--prompt-tokens", self.prompt_tokens),
            ("--new-tokens", self.new_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{flag} {value}: pass at least 1")
        if min(self.calm_s, self.whole_timeout_s, self.time_limit_s) <= 0:
            raise ConfigError("--calm-s, --whole-timeout-s and --time-limit-s must be above 0")
