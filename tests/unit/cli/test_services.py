"""`starfish agent` and its like become the service, with every argument untouched."""

from __future__ import annotations

import os
import sys

import pytest
import typer
from typer.testing import CliRunner

from cli.services import add_service_commands


@pytest.mark.parametrize(
    ("command", "module"),
    [("agent", "node_agent"), ("control-plane", "control_plane"), ("gateway", "gateway")],
)
@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["--node", "a", "--ranks=8-15", "--", "--kv-tokens", "9", "--", "x"]],
)
def test_a_service_gets_its_arguments_as_they_are(
    command: str, module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[tuple[str, list[str]]] = []

    def execute(program: str, argv: list[str]) -> None:
        executed.append((program, argv))

    monkeypatch.setattr(os, "execv", execute)
    app = typer.Typer()
    add_service_commands(app)
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 0, result.output
    assert executed == [(sys.executable, [sys.executable, "-m", module, *arguments])]
