"""The flags that say which running instance a command is about."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from cli.run_dir import Target, resolve_target
from shared.etcd_options import EtcdOptions

UrlFlag = Annotated[
    str | None, typer.Option("--url", help="HTTP address of a running instance's gateway.")
]
EtcdFlag = Annotated[
    str | None,
    typer.Option("--etcd", help="etcd endpoints of the instance, HOST:PORT[,HOST:PORT…]."),
]
EtcdCaFlag = Annotated[
    Path | None,
    typer.Option(
        "--etcd-ca",
        envvar="STARFISH_ETCD_CA",
        help="PEM file with the authority that signed etcd's certificates; turns TLS on.",
    ),
]
EtcdCertFlag = Annotated[
    Path | None,
    typer.Option(
        "--etcd-cert",
        envvar="STARFISH_ETCD_CERT",
        help="PEM file with a certificate for etcd, whose common name is the user.",
    ),
]
EtcdKeyFlag = Annotated[
    Path | None,
    typer.Option(
        "--etcd-key",
        envvar="STARFISH_ETCD_KEY",
        help="PEM file with the key of --etcd-cert, closed to other users.",
    ),
]
EtcdServerNameFlag = Annotated[
    str,
    typer.Option(
        "--etcd-server-name",
        envvar="STARFISH_ETCD_SERVER_NAME",
        help="Name in the certificates of all etcd members (default: the host of the first "
        "endpoint).",
    ),
]
EtcdUserFlag = Annotated[
    str,
    typer.Option("--etcd-user", envvar="STARFISH_ETCD_USER", help="User of etcd."),
]
EtcdPasswordFileFlag = Annotated[
    Path | None,
    typer.Option(
        "--etcd-password-file",
        envvar="STARFISH_ETCD_PASSWORD_FILE",
        help="File with the password of --etcd-user, closed to other users (default: the variable "
        "STARFISH_ETCD_PASSWORD).",
    ),
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


def etcd_options_of(flags: object) -> EtcdOptions:
    """`flags` has a field for each of them, of the same name."""
    return EtcdOptions(**{field.name: getattr(flags, field.name) for field in fields(EtcdOptions)})


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFlags:
    """An instance, found through its etcd or its run folder."""

    etcd: EtcdFlag = None
    etcd_ca: EtcdCaFlag = None
    etcd_cert: EtcdCertFlag = None
    etcd_key: EtcdKeyFlag = None
    etcd_server_name: EtcdServerNameFlag = ""
    etcd_user: EtcdUserFlag = ""
    etcd_password_file: EtcdPasswordFileFlag = None
    instance: InstanceFlag = None
    run_dir: RunDirFlag = None
    secret_file: SecretFileFlag = None

    def target(self, url: str | None = None) -> Target:
        """`url` replaces the gateway that was found. Raises ConfigError if there is no instance."""
        found = resolve_target(
            store=self._store(),
            instance=self.instance,
            run_dir=self.run_dir,
            secret_file=self.secret_file,
        )
        return found if url is None else found.with_url(url)

    def _store(self) -> EtcdOptions | None:
        """None without an endpoint: then the run folder says all. Raises ConfigError."""
        if not self.etcd:
            return None
        store = etcd_options_of(self)
        store.check()
        return store


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
        return self._found().url

    def target(self) -> Target | None:
        """The whole instance; None if only an address was given. Raises ConfigError."""
        return None if self.url else self._found()

    def _found(self) -> Target:
        return resolve_target(store=None, instance=self.instance, run_dir=self.run_dir)
