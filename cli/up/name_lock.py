"""One `starfish up` of a name on this host, for each user: whatever its etcd, port and run folder,
two of the same name could not be told apart in logs, metrics and commands."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from cli.run_dir import names_folder
from shared.errors import ConfigError
from shared.private_folder import PrivateFolder

_TEXT_BYTES_MAX = 4096


class NameLock:
    """Ends with this process, however that ends."""

    def __init__(self, folder: PrivateFolder, file: str, fd: int) -> None:
        self._folder = folder
        self._file = file
        self._fd = fd

    def release(self) -> None:
        """The file goes first, so that whoever waits for it takes a new one."""
        self._folder.remove_part(self._file)
        os.close(self._fd)
        self._folder.close()


def lock_name(
    instance: str, run_dir: Path, url: str, warn: Callable[[str], None]
) -> NameLock | None:
    """Raises ConfigError if another `starfish up` of this user has the name on this host. None if
    there is no folder of this user for names: then nobody can tell."""
    try:
        folder = PrivateFolder(names_folder())
    except ConfigError as error:
        warn(f"nobody can tell whether another instance has this name: {error}")
        return None
    file = f"{instance}.lock"
    try:
        fd = _lock(folder, file)
    except BlockingIOError as held:
        folder.close()
        raise ConfigError(_refusal(instance, str(held.args[0]))) from None
    except OSError as error:
        folder.close()
        warn(f"nobody can tell whether another instance has this name: {error.strerror}")
        return None
    text = json.dumps({"pid": os.getpid(), "run_dir": str(run_dir), "url": url})
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)
    return NameLock(folder, file, fd)


def _lock(folder: PrivateFolder, file: str) -> int:
    """Raises BlockingIOError with what the holder has written, and OSError."""
    while True:
        fd = folder.open_file(file)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, _TEXT_BYTES_MAX, 0).decode(errors="replace")
            os.close(fd)
            raise BlockingIOError(text) from None
        except OSError:
            os.close(fd)
            raise
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # its holder has just removed it


def _refusal(instance: str, text: str) -> str:
    who = "by another `starfish up`"
    try:
        holder = json.loads(text)
        pid, run_dir, url = holder["pid"], holder["run_dir"], holder["url"]
        who = f"by pid {pid} on {socket.gethostname()} ({url}, run folder {run_dir})"
    except (ValueError, KeyError, TypeError):
        pass
    return (
        f"instance {instance!r} is already running {who}; stop it with Ctrl-C, or pass another "
        "--instance, --port and --run-dir"
    )
