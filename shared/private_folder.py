"""Folders in which this user alone can change anything: how to reach one without being led
elsewhere by another user, and how to remove it. A predictable name in /tmp may have been taken by
anybody before us."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from shared.errors import ConfigError

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS_MAX = 16
_FOR_OTHERS = 0o077
_WRITABLE_BY_OTHERS = 0o022


def open_folder(path: Path, *, create: bool = False, private: bool = False) -> int:
    """A descriptor of the folder, reached from the root component by component. Every component
    belongs to root or to this user, and nobody else may rename what it contains. The last one
    belongs to this user and is no link; if `private`, others may not read it either. A link on
    the way is followed only if nobody but root and this user can have placed it. `create` makes
    what is missing, with mode 0700. Raises ConfigError if this does not hold, OSError if the folder
    is not there or cannot be made."""
    trail = _Trail(path)
    try:
        while trail.parts:
            trail.step(create=create)
        trail.check_last(_FOR_OTHERS if private else _WRITABLE_BY_OTHERS)
    except BaseException:
        os.close(trail.fd)
        raise
    return trail.fd


class _Trail:
    """A walk from the root to a folder. `fd` is what has been reached, `walked` its name."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open("/", _OPEN)
        self.walked = Path("/")
        self.parts = deque(Path(os.path.abspath(path)).parts[1:])
        self._links = 0

    def step(self, *, create: bool) -> None:
        name = self.parts.popleft()
        parent = os.fstat(self.fd)
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.fd)
        found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            self._follow(name, parent, found)
            return
        path = self.walked / name
        fd = os.open(name, _OPEN, dir_fd=self.fd)
        os.close(self.fd)
        self.fd, self.walked = fd, path
        opened = os.fstat(fd)
        if opened.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{path} belongs to another user (uid {opened.st_uid})")
        if self.parts and _others_may_rename_in(opened) and not opened.st_mode & stat.S_ISVTX:
            raise ConfigError(f"{path} can be written by other users: run `chmod go-w {path}`")

    def _follow(self, name: str, parent: os.stat_result, link: os.stat_result) -> None:
        path = self.walked / name
        if not self.parts:
            raise ConfigError(f"{path} is a symbolic link; a folder is needed")
        if _others_may_rename_in(parent) or link.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{path} is a symbolic link that another user may have placed")
        self._links += 1
        if self._links > _LINKS_MAX:
            raise ConfigError(f"{path}: too many symbolic links")
        target = os.path.normpath(self.walked / os.readlink(name, dir_fd=self.fd))
        os.close(self.fd)
        self.fd = os.open("/", _OPEN)
        self.walked = Path("/")
        self.parts.extendleft(reversed(Path(target).parts[1:]))

    def check_last(self, forbidden: int) -> None:
        last = os.fstat(self.fd)
        if last.st_uid != os.geteuid():
            raise ConfigError(f"{self.walked} belongs to another user (uid {last.st_uid})")
        if last.st_mode & forbidden:
            raise ConfigError(
                f"other users have access to {self.walked}: run `chmod 700 {self.walked}`"
            )


def _others_may_rename_in(folder: os.stat_result) -> bool:
    """Apart from a sticky bit. The own group counts as the user: whoever shares it shares files."""
    if folder.st_mode & stat.S_IWOTH:
        return True
    return bool(folder.st_mode & stat.S_IWGRP) and folder.st_gid not in (0, os.getegid())


class PrivateFolder:
    """A folder of this user with mode 0700, created if necessary. Its parts are removed through
    descriptors: whatever happens to the names on the way to it, nothing else is removed."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the folder does not, or cannot, belong to this user alone."""
        self.path = path
        try:
            self._fd = open_folder(path, create=True, private=True)
            self.parent_fd = open_parent(self._fd)
        except OSError as error:
            raise ConfigError(f"cannot create {path}: {error.strerror}") from error

    @property
    def fd(self) -> int:
        return self._fd

    def open_file(self, name: str) -> int:
        """A descriptor for reading and writing. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self._fd)

    def remove_part(self, name: str) -> None:
        """A file or a folder with all that it contains. Nothing happens if it is not there, or if
        something forbids it."""
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self._fd)
            else:
                os.unlink(name, dir_fd=self._fd)

    def remove(self) -> None:
        """With all that it contains, if its name still stands for it."""
        own = os.fstat(self._fd)
        with contextlib.suppress(OSError):
            now = os.stat(self.path.name, dir_fd=self.parent_fd, follow_symlinks=False)
            if os.path.samestat(own, now):
                shutil.rmtree(self.path.name, ignore_errors=True, dir_fd=self.parent_fd)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self.parent_fd)


def open_parent(fd: int) -> int:
    """Raises OSError."""
    return os.open("..", _OPEN, dir_fd=fd)


def is_own_file(path: Path) -> bool:
    """Whether `path` is a regular file, no link, that only root and this user can change. Its
    folder is not looked at. Raises OSError if it is not there."""
    found = os.stat(path, follow_symlinks=False)
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid in (0, os.geteuid())
        and not found.st_mode & _WRITABLE_BY_OTHERS
    )


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where this user's caches belong: below XDG_CACHE_HOME, else below the home folder, else (no
    home, or one that cannot be written, as in a container) below /tmp. It need not exist yet, and
    is not checked: `prepare_cache` does both."""
    if explicit := environ.get("XDG_CACHE_HOME"):
        return Path(explicit) / "starfish"
    home = environ.get("HOME", "")
    if home.startswith("/") and _can_create_in(Path(home) / ".cache"):
        return Path(home) / ".cache" / "starfish"
    return Path(f"/tmp/starfish-{os.geteuid()}") / "cache"


def _can_create_in(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def prepare_cache(folder: Path) -> None:
    """Creates it if necessary. Raises ConfigError if another user could put files there."""
    try:
        os.close(open_folder(folder, create=True))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; set XDG_CACHE_HOME"
        ) from error
