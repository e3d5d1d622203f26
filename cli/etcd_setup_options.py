"""The options of `starfish etcd-setup`: on which etcd to make an instance's users, and as whom."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from cli.target_flags import (
    EtcdCaFlag,
    EtcdCertFlag,
    EtcdKeyFlag,
    EtcdPasswordFileFlag,
    EtcdServerNameFlag,
    EtcdUserFlag,
    etcd_options_of,
)
from shared.etcd_credentials import CA_FILE, password_path
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import ROOT


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSetupOptions:
    """One field per flag."""

    etcd: Annotated[str, typer.Option(help="etcd endpoints, HOST:PORT[,HOST:PORT…].")]
    credentials: Annotated[
        Path,
        typer.Option(
            help="Folder for what each service needs, closed to other users. If `starfish "
            "etcd-certificates` made it, users get certificates, else passwords. What is there "
            "already is used."
        ),
    ]
    etcd_ca: EtcdCaFlag = None
    etcd_cert: EtcdCertFlag = None
    etcd_key: EtcdKeyFlag = None
    etcd_server_name: EtcdServerNameFlag = ""
    etcd_user: EtcdUserFlag = ""
    etcd_password_file: EtcdPasswordFileFlag = None
    instance: Annotated[str, typer.Option(help="Name of the instance.")] = "default"
    enable_auth: Annotated[
        bool,
        typer.Option(
            "--enable-auth",
            help="Turn etcd's authentication on, for all who use this etcd. Makes its user root "
            "if there is none, with its credentials in the same folder.",
        ),
    ] = False

    def root(self) -> EtcdOptions:
        """As whom to make users: as given, else as root of the folder, else as nobody, which etcd
        allows until its authentication is on."""
        folder, given = self.credentials, etcd_options_of(self)
        if given.etcd_ca is None and (folder / CA_FILE).exists():
            given = replace(given, etcd_ca=folder / CA_FILE)
        if given.etcd_cert or given.etcd_user:
            return given
        if (folder / f"{ROOT}.pem").exists():
            certificate, key = folder / f"{ROOT}.pem", folder / f"{ROOT}.key"
            return replace(given, etcd_cert=certificate, etcd_key=key)
        if (password := password_path(folder, ROOT)).exists():
            return replace(given, etcd_user=ROOT, etcd_password_file=password)
        return given
