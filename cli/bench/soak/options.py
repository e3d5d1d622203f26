"""The options of `starfish bench soak`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakOptions:
    minutes: Annotated[float, typer.Option(help="How long the load lasts.")] = 10.0
    faults: Annotated[
        str, typer.Option(help="Names of faults, comma-separated (see docs/chaos.md); or all.")
    ] = "all"
    every_s: Annotated[
        float,
        typer.Option(
            help="Seconds from one fault to the next; longer, if the instance is not whole by then."
        ),
    ] = 20.0
    clients: Annotated[
        int,
        typer.Option(
            help="Concurrent clients, in turn one that chats, one with long prompts, one with "
            "guided answers, and one that leaves in the middle."
        ),
    ] = 8
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer, at most.")] = 64
    long_tokens: Annotated[int, typer.Option(help="Tokens of each long prompt.")] = 1024
    seed: Annotated[int, typer.Option(help="Chooses prompts, faults and victims.")] = 1
    warm_up_s: Annotated[
        float, typer.Option(help="What a process or the instance takes at first is no growth.")
    ] = 60.0
    sample_s: Annotated[float, typer.Option(help="Seconds from one sample to the next.")] = 5.0
    whole_timeout_s: Annotated[
        float, typer.Option(help="Give the instance up if it is not whole again so long after.")
    ] = 120.0
    report: Annotated[Path | None, typer.Option(help="Also write the JSON into this file.")] = None
    keep_logs: Annotated[
        Path | None, typer.Option(help="Copy the logs of the instance into this folder.")
    ] = None

    def check(self) -> None:
        """Raises ConfigError."""
        for flag, value in (
            ("--minutes", self.minutes),
            ("--every-s", self.every_s),
            ("--sample-s", self.sample_s),
            ("--whole-timeout-s", self.whole_timeout_s),
        ):
            if value <= 0:
                raise ConfigError(f"{flag} {value:g}: pass more than 0")
        for flag, count in (
            ("--clients", self.clients),
            ("--new-tokens", self.new_tokens),
            ("--long-tokens", self.long_tokens),
        ):
            if count < 1:
                raise ConfigError(f"{flag} {count}: pass at least 1")
        if self.warm_up_s < 0:
            raise ConfigError(f"--warm-up-s {self.warm_up_s:g}: pass 0 or more")
