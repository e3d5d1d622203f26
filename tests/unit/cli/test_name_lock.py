"""One `starfish up` of a name on a host."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cli.run_dir import names_folder
from cli.up.name_lock import NameLock, lock_name
from cli.up.port_holder import holder_of
from shared.errors import ConfigError


@pytest.fixture(autouse=True)
def _runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


def lock(name: str, run_dir: str = "/runs/a") -> NameLock:
    said: list[str] = []
    held = lock_name(name, Path(run_dir), "http://h:1", said.append)
    assert said == []
    assert held is not None
    return held


def test_the_second_one_learns_who_has_the_name_and_what_to_do() -> None:
    held = lock("one")
    with pytest.raises(ConfigError, match="--instance") as refused:
        lock("one", "/runs/b")
    assert f"pid {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    assert "/runs/a" in str(refused.value)
    held.release()


def test_another_name_is_free_and_a_released_one_as_well() -> None:
    held, other = lock("one"), lock("two")
    held.release()
    lock("one").release()
    other.release()
    assert list(names_folder().iterdir()) == []


def test_what_a_killed_run_has_left_holds_nothing() -> None:
    names_folder().mkdir(mode=0o700, parents=True)
    (names_folder() / "one.lock").write_text("a pid that says nothing")
    lock("one").release()


def test_without_a_folder_of_ones_own_nobody_is_refused(tmp_path: Path) -> None:
    names_folder().parent.mkdir(mode=0o700)
    names_folder().write_text("no folder")
    said: list[str] = []
    assert lock_name("one", Path("/runs/a"), "http://h:1", said.append) is None
    assert len(said) == 1


def test_who_listens_on_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert str(holder_of(port)).startswith(f"pid {os.getpid()}: ")
    assert holder_of(port) is None
