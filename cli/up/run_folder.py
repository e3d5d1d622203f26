"""The folder of one `starfish up` run: what the start creates in it and the end removes. A lock on
it keeps a second run away."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from cli.run_dir import ADMIN_TOKEN_FILE, LOCK_FILE, SECRET_FILE, STATE_FILE
from shared.errors import ConfigError
from shared.private_folder import PrivateFolder
from shared.secret import create_secret

PARTS = (STATE_FILE, SECRET_FILE, ADMIN_TOKEN_FILE, "etcd", "mps")
"""What a run creates in its folder, apart from its logs and its lock."""


class RunFolder:
    """`is_default`: no flag named the folder, so it is removed whole. A folder that a flag named
    stays, with whatever others have put there."""

    def __init__(self, path: Path, *, is_default: bool) -> None:
        """Creates the folder, without files of an earlier run. Raises ConfigError if it does not
        belong to this user alone, or if another run uses it."""
        self.path = path
        self.is_default = is_default
        self.log_dir = path / "logs"
        self.secret_file = path / SECRET_FILE
        self._is_removed = False
        try:
            self._folder = PrivateFolder(path)
        except ConfigError as error:
            raise ConfigError(f"{error}; or pass --run-dir with a folder of your own") from error
        try:
            self._lock_fd = self._lock()
        except BaseException:
            self._folder.close()
            raise
        self._remove_parts(keep_logs=False)
        self.log_dir.mkdir(mode=0o700, exist_ok=True)
        for file in (self.secret_file, path / ADMIN_TOKEN_FILE):
            try:
                create_secret(file)
            except OSError as error:
                raise ConfigError(f"cannot write {file}: {error.strerror}") from error

    @property
    def parent_fd(self) -> int:
        """Of the folder that contains this one."""
        return self._folder.parent_fd

    @property
    def fd(self) -> int:
        return self._folder.fd

    def _lock(self) -> int:
        """Ends with this process."""
        fd = self._folder.open_file(LOCK_FILE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            raise ConfigError(
                f"an instance is already running from {self.path} (pid {pid}); stop it with "
                "Ctrl-C, or pass another --instance, --port and --run-dir"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        return fd

    def remove_files(self, *, keep_logs: bool) -> None:
        """At the end of the run. A second call, of one who cannot wait for the first, does
        nothing."""
        if self._is_removed:
            return
        self._is_removed = True
        self._remove_parts(keep_logs=keep_logs)
        self._folder.remove_part(LOCK_FILE)
        os.close(self._lock_fd)
        if not keep_logs and self.is_default:
            self._folder.remove()
        self._folder.close()

    def _remove_parts(self, *, keep_logs: bool) -> None:
        for part in (*PARTS, *(() if keep_logs else ("logs",))):
            self._folder.remove_part(part)
