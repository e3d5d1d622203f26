"""The load that each benchmark puts on an instance: one dataclass per benchmark, one field per
flag."""

from __future__ import annotations

from dataclasses import dataclass
from signal import Signals
from typing import Annotated

import typer

from cli.observe.signals import SIGNALS
from shared.errors import ConfigError

FAULT_SIGNALS = ("KILL", "STOP")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLoad:
    """Several rounds of requests at each of several concurrencies."""

    concurrency: Annotated[
        str, typer.Option(help="Numbers of concurrent clients, comma-separated.")
    ] = "1,8,32"
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 96
    rounds: Annotated[int, typer.Option(help="Requests of each client, one after another.")] = 2

    def check(self) -> None:
        """Raises ConfigError."""
        _ = self.concurrencies

    @property
    def concurrencies(self) -> tuple[int, ...]:
        """Raises ConfigError if `concurrency` is not a list of positive numbers."""
        flag = f"--concurrency {self.concurrency!r}"
        try:
            numbers = tuple(int(part) for part in self.concurrency.split(","))
        except ValueError:
            raise ConfigError(f"{flag}: pass numbers, for example 1,8,32") from None
        if min(numbers) < 1:
            raise ConfigError(f"{flag}: each number of clients must be at least 1")
        return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixLoad:
    tries: Annotated[int, typer.Option(help="Number of prompts.")] = 10
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512
    turn_tokens: Annotated[int, typer.Option(help="Tokens that the next turn of a chat adds.")] = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultLoad:
    tries: Annotated[int, typer.Option(help="Number of faults.")] = 10
    streams: Annotated[int, typer.Option(help="Number of concurrent streams.")] = 16
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 96
    seed: Annotated[int, typer.Option(help="Chooses prompts, ranks and moments.")] = 1
    signal: Annotated[str, typer.Option(help="KILL or STOP.")] = "KILL"

    def check(self) -> None:
        """Raises ConfigError."""
        if self.signal not in FAULT_SIGNALS:
            raise ConfigError(f"--signal {self.signal!r}: pass KILL or STOP")

    @property
    def signal_number(self) -> Signals:
        return SIGNALS[self.signal]
