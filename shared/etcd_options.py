"""Where etcd is, and as whom a process reaches it: the flags that every service and every command
that talks to etcd has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shared.config import option
from shared.errors import ConfigError
from shared.secret import read_private_file

PASSWORD_VARIABLE = "STARFISH_ETCD_PASSWORD"


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdOptions:
    """Without a CA the connection is in the clear. A process is known to etcd by the common name of
    its certificate, or by its user and password; without either it is nobody."""

    etcd: str = option("127.0.0.1:2379", "etcd endpoints, comma-separated host:port")
    etcd_ca: Path | None = option(
        None, "PEM file with the authority that signed etcd's certificates; turns TLS on"
    )
    etcd_cert: Path | None = option(
        None, "PEM file with this process's certificate for etcd, whose common name is its user"
    )
    etcd_key: Path | None = option(
        None, "PEM file with the key of --etcd-cert, closed to other users"
    )
    etcd_server_name: str = option(
        "", "name in the certificates of all etcd members; default: the host of the first endpoint"
    )
    etcd_user: str = option("", "user of etcd; needs --etcd-ca, unless etcd is on this host")
    etcd_password_file: Path | None = option(
        None,
        "file with the password of --etcd-user, closed to other users; default: the variable "
        f"{PASSWORD_VARIABLE}",
    )

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(part for part in self.etcd.split(",") if part)

    def check(self) -> None:
        """Raises ConfigError if the options contradict each other, or a key is open to others."""
        if (self.etcd_cert is None) != (self.etcd_key is None):
            raise ConfigError("--etcd-cert and --etcd-key go together: give both or neither")
        if self.etcd_ca is None and self.etcd_cert is not None:
            raise ConfigError("--etcd-cert needs TLS: pass --etcd-ca as well")
        if self.etcd_ca is None and self.etcd_server_name:
            raise ConfigError("--etcd-server-name is for TLS: pass --etcd-ca as well")
        if self.etcd_password_file is not None and not self.etcd_user:
            raise ConfigError("--etcd-password-file is for a user: pass --etcd-user as well")
        if self.etcd_ca is None and self.etcd_user and not self._is_on_this_host():
            raise ConfigError(
                "--etcd-user without TLS would show the password to the network: pass --etcd-ca"
            )
        for flag, path in (("--etcd-ca", self.etcd_ca), ("--etcd-cert", self.etcd_cert)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{flag} {path}: there is no such file")
        if self.etcd_key is not None:
            read_private_file(self.etcd_key, flag="--etcd-key")

    def password(self, environ: Mapping[str, str]) -> str | None:
        """None without a user. Raises ConfigError if a user has none."""
        if not self.etcd_user:
            return None
        if self.etcd_password_file is not None:
            found = read_private_file(self.etcd_password_file, flag="--etcd-password-file").decode()
        else:
            found = environ.get(PASSWORD_VARIABLE, "")
        if not found:
            raise ConfigError(
                f"--etcd-user {self.etcd_user} has no password: pass --etcd-password-file, or set "
                f"{PASSWORD_VARIABLE}"
            )
        return found

    def absolute(self) -> EtcdOptions:
        """For processes that run elsewhere."""
        return replace(
            self,
            etcd_ca=_absolute(self.etcd_ca),
            etcd_cert=_absolute(self.etcd_cert),
            etcd_key=_absolute(self.etcd_key),
            etcd_password_file=_absolute(self.etcd_password_file),
        )

    def flags(self) -> tuple[str, ...]:
        """The command line that says the same. It has names of files, and nothing secret."""
        values = (
            ("--etcd", self.etcd),
            ("--etcd-ca", self.etcd_ca),
            ("--etcd-cert", self.etcd_cert),
            ("--etcd-key", self.etcd_key),
            ("--etcd-server-name", self.etcd_server_name),
            ("--etcd-user", self.etcd_user),
            ("--etcd-password-file", self.etcd_password_file),
        )
        return tuple(part for flag, value in values if value for part in (flag, str(value)))

    def _is_on_this_host(self) -> bool:
        hosts = {endpoint.removeprefix("http://").rpartition(":")[0] for endpoint in self.endpoints}
        return hosts <= {"127.0.0.1", "localhost", "[::1]"}


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
