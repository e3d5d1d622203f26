"""The flags that say which running instance a command is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cli.run_dir import Target, resolve_target

UrlFlag = Annotated[
    str | None, typer.Option("--url", help="HTTP address of a running instance's gateway.")
]
EtcdFlag = Annotated[
    str | None,
    typer.Option("--etcd", help="etcd endpoints of the instance, HOST:PORT[,HOST:PORT…]."),
]
InstanceFlag = Annotated[
    str | None, typer.Option("--instance", help="Name of the instance (default: default).")
]
RunDirFlag = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run, as given to `starfish up`.")
]
SecretFileFlag = Annotated[
    Path | None,
    typer.Option(
        "--secret-file",
        help="File with the instance's secret, if another command than `starfish up` runs it.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, for programs to read.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFlags:
    """An instance, found through its etcd or its run folder."""

    etcd: EtcdFlag = None
    instance: InstanceFlag = None
    run_dir: RunDirFlag = None
    secret_file: SecretFileFlag = None

    def target(self, url: str | None = None) -> Target:
        """`url` replaces the gateway that was found. Raises ConfigError if there is no instance."""
        found = resolve_target(
            etcd=self.etcd,
            instance=self.instance,
            run_dir=self.run_dir,
            secret_file=self.secret_file,
        )
        return found if url is None else found.with_url(url)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayFlags:
    """A gateway, given by address or found through the instance's run folder."""

    url: UrlFlag = None
    run_dir: RunDirFlag = None
    instance: InstanceFlag = None

    def gateway_url(self) -> str | None:
        """None if the instance has no known gateway. Raises ConfigError if there is no instance."""
        if self.url:
            return self.url
        return resolve_target(etcd=None, instance=self.instance, run_dir=self.run_dir).url
