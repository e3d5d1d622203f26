"""A dataclass's fields as flags of a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from cli.flags import flags_from_dataclasses


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    metres_per_s: Annotated[float, typer.Option("--speed", help="How fast.")] = 1.5
    names: Annotated[list[str], typer.Option("--name")] = field(default_factory=list)
    hidden: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    city: Annotated[str, typer.Option()]


def run(command: Callable[..., None], *arguments: str) -> str:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@flags_from_dataclasses
def go(
    speed: Speed,
    place: Place,
    times: Annotated[int, typer.Argument()],
    loud: Annotated[bool, typer.Option("--loud")] = False,
) -> None:
    """Go somewhere."""
    print(speed.metres_per_s, speed.names, speed.hidden, place.city, times, loud)


def test_fields_have_their_defaults() -> None:
    assert run(go, "3", "--city", "Bern") == "1.5 [] 7 Bern 3 False"


def test_flags_fill_the_fields_of_each_dataclass() -> None:
    given = ["3", "--city", "Bern", "--speed", "2", "--name", "a", "--name", "b", "--loud"]
    assert run(go, *given) == "2.0 ['a', 'b'] 7 Bern 3 True"


def test_help_has_every_flag_and_the_commands_text() -> None:
    text = run(go, "--help")
    assert "Go somewhere." in text
    assert "How fast." in text
    assert "--city" in text
    assert "hidden" not in text


def test_a_flag_declared_twice_is_refused() -> None:
    def twice(first: Place, second: Place) -> None:
        pass

    with pytest.raises(ValueError, match="city"):
        flags_from_dataclasses(twice)
