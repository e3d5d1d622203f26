"""The state file of a running instance on this host, by which `status`, `watch` and `kill` find it
without flags."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions
from shared.handshake import Access
from shared.private_folder import open_folder
from shared.secret import read_secret

STATE_FILE = "starfish.json"
SECRET_FILE = "secret"
ADMIN_TOKEN_FILE = "admin-token"
LOCK_FILE = "lock"  # with the pid of the `starfish up` that runs from the folder and holds it


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What `starfish up` writes as soon as its parts have addresses."""

    instance: str
    etcd: str
    url: str
    pid: int  # of `starfish up`
    model: str
    secret_file: str = ""  # with the secret that the instance's processes share
    metrics_ports: tuple[int, ...] = ()  # of the control planes, then of the node agent
    etcd_ca: str = ""  # this and what follows: as whom commands reach etcd (`EtcdOptions`)
    etcd_cert: str = ""
    etcd_key: str = ""
    etcd_server_name: str = ""
    etcd_user: str = ""
    etcd_password_file: str = ""
    admin_url: str = ""  # of the admin API, whichever control plane leads
    admin_token_file: str = ""
    admin_ca: str = ""  # whose certificates are believed of the admin API

    def target(self) -> Target:
        return Target(
            store=self._store(),
            instance=self.instance,
            url=self.url,
            secret_file=_path(self.secret_file),
            admin_url=self.admin_url or None,
            admin_token_file=_path(self.admin_token_file),
            admin_ca=_path(self.admin_ca),
        )

    def _store(self) -> EtcdOptions:
        return EtcdOptions(
            etcd=self.etcd,
            etcd_ca=_path(self.etcd_ca),
            etcd_cert=_path(self.etcd_cert),
            etcd_key=_path(self.etcd_key),
            etcd_server_name=self.etcd_server_name,
            etcd_user=self.etcd_user,
            etcd_password_file=_path(self.etcd_password_file),
        )


def state_of_store(store: EtcdOptions) -> dict[str, str]:
    """The fields of `RunState` that say how to reach etcd."""
    values = dataclasses.asdict(store)
    return {name: str(value) if value else "" for name, value in values.items()}


def _path(name: str) -> Path | None:
    return Path(name) if name else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The instance that a command is about."""

    store: EtcdOptions
    instance: str
    url: str | None = None  # of a gateway, if one is known
    secret_file: Path | None = None
    admin_url: str | None = None  # None: only etcd knows it
    admin_token_file: Path | None = None
    admin_ca: Path | None = None  # None: the system's authorities are believed

    @property
    def etcd(self) -> str:
        """Its endpoints."""
        return self.store.etcd

    def access(self) -> Access:
        """What its ranks ask for. Raises ConfigError."""
        return Access(self.instance, read_secret(self.secret_file))

    def with_url(self, url: str) -> Target:
        return replace(self, url=url)


def default_run_dir(instance: str) -> Path:
    """A folder of this user, which does not survive the login session or the next boot. It is not
    looked at: whoever uses it checks that it is this user's."""
    return _runtime_folder() / instance


def names_folder() -> Path:
    """Where each running instance of this user has a file of its name."""
    return _runtime_folder() / ".names"


def _runtime_folder() -> Path:
    if explicit := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(explicit) / "starfish"
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/starfish")
    session = Path(f"/run/user/{os.geteuid()}")
    if os.geteuid() != 0 and os.access(session, os.W_OK):
        return session / "starfish"
    return Path(f"/tmp/starfish-{os.geteuid()}")


def write_state(run_dir: Path, state: RunState) -> None:
    """Replaces the file in one step: a reader sees the old or the new one, never a part."""
    fresh = run_dir / f"{STATE_FILE}.new"
    fresh.write_text(json.dumps(msgspec.to_builtins(state), indent=2) + "\n")
    fresh.rename(run_dir / STATE_FILE)


def read_state(run_dir: Path) -> RunState | None:
    """None if there is no state file. Raises ConfigError if it is malformed, or if another user
    may have written it: commands send signals to what it names."""
    try:
        os.close(open_folder(run_dir))
        raw = (run_dir / STATE_FILE).read_bytes()
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ConfigError(f"{error}; pass --run-dir with a folder of your own") from error
    except OSError as error:
        raise ConfigError(f"cannot read {run_dir / STATE_FILE}: {error.strerror}") from error
    try:
        return msgspec.json.decode(raw, type=RunState)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{run_dir / STATE_FILE} is malformed: {error}; delete it") from error


def is_starting(run_dir: Path) -> bool:
    """Whether `starfish up` runs from there, without a state file yet, or any more. The lock is
    left alone: whoever tries it takes it from one that starts in this moment."""
    try:
        fd = os.open(run_dir / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(fd, "rb") as file:
        pid = file.read(32).decode(errors="replace").strip()
    return pid.isdecimal() and Path(f"/proc/{pid}").exists()


def resolve_target(
    *,
    store: EtcdOptions | None,
    instance: str | None,
    run_dir: Path | None,
    secret_file: Path | None = None,
) -> Target:
    """`store` and `secret_file` take precedence over the state file. Raises ConfigError if no
    instance is found."""
    name = instance or "default"
    if store is not None:
        return Target(store=store, instance=name, secret_file=secret_file)
    folder = run_dir or default_run_dir(name)
    state = read_state(folder)
    if state is None and is_starting(folder):
        raise ConfigError(
            f"the instance in {folder} is starting, or about to end; ask again in a moment"
        )
    if state is None:
        hint = "" if run_dir else _others(folder)
        raise ConfigError(
            f"no instance runs from {folder}{hint}; start one with `starfish up`, or pass --etcd "
            "HOST:PORT and --instance NAME"
        )
    found = state.target()
    return found if secret_file is None else replace(found, secret_file=secret_file)


def _others(folder: Path) -> str:
    names = sorted(path.parent.name for path in folder.parent.glob(f"*/{STATE_FILE}"))
    return f" (but --instance {', --instance '.join(names)} does)" if names else ""
