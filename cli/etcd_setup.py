"""What `starfish etcd-certificates` and `starfish etcd-setup` do: they give an etcd that runs
elsewhere what it needs, so that it lets in an instance's services alone, each to its own keys."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from cli.etcd_setup_options import EtcdSetupOptions
from shared.clock import SystemClock
from shared.errors import ConfigError
from shared.etcd_admin import EtcdAdmin
from shared.etcd_certificates import SERVER, CertificateAuthority
from shared.etcd_credentials import CA_FILE, CA_KEY_FILE, password_path
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import ROOT, accounts
from shared.etcd_store import connect_store
from shared.keys import Keys
from shared.private_folder import PrivateFolder
from shared.secret import read_private_file, write_private_file

Progress = Callable[[str], None]


def make_certificates(folder: Path, hosts: Sequence[str], instance: str = "") -> list[str]:
    """What there is now, for people. Raises ConfigError."""
    users = [ROOT, *(account.name for account in accounts(Keys(instance)) if instance)]
    PrivateFolder(folder).close()
    try:
        authority = CertificateAuthority.load_or_create(folder, SystemClock())
        authority.issue_server(hosts)
        for user in users:
            if not (folder / f"{user}.pem").exists():
                authority.issue_client(user)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
    return [
        f"{folder / CA_FILE}: the authority, for everybody",
        f"{folder / CA_KEY_FILE}: its key; `starfish etcd-setup` needs it, etcd does not",
        f"{folder / SERVER}.pem and .key: for etcd, as {', '.join(hosts)}",
        *(f"{folder / user}.pem and .key: for etcd's user {user}" for user in users),
    ]


async def set_up(options: EtcdSetupOptions, on_progress: Progress) -> None:
    """Raises StarfishError."""
    PrivateFolder(options.credentials).close()
    keys, root = Keys(options.instance), options.root()
    await (await connect_store(root)).close()  # says at once what is wrong
    wanted = accounts(keys)
    try:
        passwords = _credentials(options, [account.name for account in wanted], on_progress)
        root_password = _root_password(options, root)
    except OSError as error:
        raise ConfigError(f"cannot write to {options.credentials}: {error.strerror}") from error
    admin = EtcdAdmin(root)
    try:
        await admin.set_up(wanted, passwords, lambda user: on_progress(f"{user}: user and role"))
        if options.enable_auth:
            await admin.enable(root_password)
            on_progress("etcd asks everybody who they are")
        elif not root.etcd_user and not root.etcd_cert:
            on_progress("etcd does not ask who anybody is yet: repeat this with --enable-auth")
    finally:
        admin.close()


def _credentials(
    options: EtcdSetupOptions, users: Sequence[str], on_progress: Progress
) -> dict[str, str]:
    """Makes what is missing in the folder; returns the passwords."""
    folder = options.credentials
    if (folder / CA_KEY_FILE).exists():
        authority = CertificateAuthority.load(folder, SystemClock())
        for user in users:
            if not (folder / f"{user}.pem").exists():
                certificate, _ = authority.issue_client(user)
                on_progress(f"{user}: certificate in {certificate}")
        return {}
    return {user: _password(password_path(folder, user), on_progress) for user in users}


def _password(path: Path, on_progress: Progress) -> str:
    if not path.exists():
        write_private_file(path, secrets.token_hex(32).encode() + b"\n")
        on_progress(f"{path.stem}: password in {path}")
    return read_private_file(path, flag="--credentials").decode()


def _root_password(options: EtcdSetupOptions, root: EtcdOptions) -> str | None:
    """None if root comes with a certificate, or is not ours to make."""
    if not options.enable_auth or root.etcd_cert is not None or root.etcd_user:
        return None
    return _password(password_path(options.credentials, ROOT), lambda _: None)
