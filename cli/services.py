"""The services as commands: `starfish agent`, `starfish control-plane` and `starfish gateway`
become the service, in the same process, so that signals and exit codes are the service's own.
Options are the service's as well, `--help` among them."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand

HOSTS_PANEL = "Services, for several hosts"


class ServiceCommand(TyperCommand):
    """Leaves every argument as it is, `--` and `--help` included."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


def add_service_commands(app: typer.Typer) -> None:
    for command in (agent, control_plane, gateway):
        name = command.__name__.replace("_", "-")
        app.command(name=name, cls=ServiceCommand, rich_help_panel=HOSTS_PANEL)(command)


def agent(context: typer.Context) -> None:
    """Run the node agent of this host: it starts the host's ranks, and starts them again.

    The options are those of [agent](configuration.md#agent).
    """
    _become("node_agent", context)


def control_plane(context: typer.Context) -> None:
    """Run a control plane: one of them leads, the others stand by.

    The options are those of [control_plane](configuration.md#control_plane).
    """
    _become("control_plane", context)


def gateway(context: typer.Context) -> None:
    """Run a gateway, which clients connect to. Any number may run.

    The options are those of [gateway](configuration.md#gateway).
    """
    _become("gateway", context)


def _become(module: str, context: typer.Context) -> None:
    os.execv(sys.executable, [sys.executable, "-m", module, *context.args])
