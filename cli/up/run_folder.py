"""The folder of one `starfish up` run: what the start creates in it and the end removes. A lock on
it keeps a second run away."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from cli.run_dir import SECRET_FILE, create_run_dir, remove_state
from shared.errors import ConfigError
from shared.secret import create_secret

_LOCK_FILE = "lock"


class RunFolder:
    """`is_default`: no flag named the folder, so it is removed whole. A folder that a flag named
    stays, with whatever others have put there."""

    def __init__(self, path: Path, *, is_default: bool) -> None:
        self.path = path
        self.is_default = is_default
        self.log_dir = path / "logs"
        self.secret_file = path / SECRET_FILE
        self._lock_fd = -1

    def prepare(self) -> None:
        """Creates the folder, without files of an earlier run. Raises ConfigError if it cannot
        belong to this user alone, or if another run uses it."""
        create_run_dir(self.path)
        self._lock()
        self._remove_parts(keep_logs=False)
        self.log_dir.mkdir(exist_ok=True)
        try:
            create_secret(self.secret_file)
        except OSError as error:
            raise ConfigError(f"cannot write {self.secret_file}: {error.strerror}") from error

    def _lock(self) -> None:
        """Ends with this process."""
        path = self.path / _LOCK_FILE
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode(errors="replace").strip()
            os.close(fd)
            raise ConfigError(
                f"an instance is already running from {self.path} (pid {pid}); stop it with "
                "Ctrl-C, or pass another --instance and --port"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._lock_fd = fd

    def remove_files(self, *, keep_logs: bool) -> None:
        """At the end of the run."""
        self._remove_parts(keep_logs=keep_logs)
        if self._lock_fd >= 0:
            (self.path / _LOCK_FILE).unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1
        if not keep_logs and self.is_default:
            shutil.rmtree(self.path, ignore_errors=True)

    def _remove_parts(self, *, keep_logs: bool) -> None:
        remove_state(self.path)
        self.secret_file.unlink(missing_ok=True)
        for part in ("etcd", "mps"):
            shutil.rmtree(self.path / part, ignore_errors=True)
        if not keep_logs:
            shutil.rmtree(self.log_dir, ignore_errors=True)
