"""A folder with what each service needs to be known to etcd, made by `starfish etcd-setup`: the
authority, and for each user a certificate and its key, or a password."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import EtcdService, user_of
from shared.keys import Keys

CA_FILE, CA_KEY_FILE = "ca.pem", "ca.key"


def password_path(folder: Path, user: str) -> Path:
    return folder / f"{user}.password"


def read_credentials(
    folder: Path, base: EtcdOptions, keys: Keys, service: EtcdService
) -> EtcdOptions:
    """`base` with what this service is known by. Raises ConfigError if the folder has nothing for
    it."""
    user = user_of(keys, service)
    ca = folder / CA_FILE
    known = replace(
        base,
        etcd_ca=ca if base.etcd_ca is None and ca.exists() else base.etcd_ca,
        etcd_cert=None,
        etcd_key=None,
        etcd_user="",
        etcd_password_file=None,
    )
    certificate, password = folder / f"{user}.pem", password_path(folder, user)
    if certificate.exists():
        return replace(known, etcd_cert=certificate, etcd_key=folder / f"{user}.key")
    if password.exists():
        return replace(known, etcd_user=user, etcd_password_file=password)
    raise ConfigError(
        f"{folder} has neither a certificate nor a password of {user!r}; make them with "
        f"`starfish etcd-setup --instance {keys.instance} --credentials {folder}`"
    )
