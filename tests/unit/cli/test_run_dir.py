"""How commands find an instance without flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.run_dir import (
    LOCK_FILE,
    RunState,
    Target,
    default_run_dir,
    read_state,
    resolve_target,
    write_state,
)
from cli.up.run_folder import RunFolder
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions

STATE = RunState(instance="blue", etcd="h:1", url="http://x:2", pid=3, model="/m")


def test_what_is_written_is_read_until_the_run_ends(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    write_state(tmp_path, STATE)
    assert read_state(tmp_path) == STATE
    RunFolder(tmp_path, is_default=False).remove_files(keep_logs=False)
    assert read_state(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_flags_win_over_the_state_file(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    found = resolve_target(store=None, instance=None, run_dir=tmp_path)
    assert found == Target(store=EtcdOptions(etcd="h:1"), instance="blue", url="http://x:2")
    found = resolve_target(store=EtcdOptions(etcd="other:2"), instance="red", run_dir=tmp_path)
    assert found == Target(store=EtcdOptions(etcd="other:2"), instance="red")


def test_the_default_folder_is_told_by_the_instances_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = default_run_dir("blue")
    folder.mkdir(parents=True)
    write_state(folder, STATE)
    assert resolve_target(store=None, instance="blue", run_dir=None).etcd == "h:1"
    with pytest.raises(ConfigError, match="--instance blue"):
        resolve_target(store=None, instance=None, run_dir=None)


def test_a_garbled_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "starfish.json").write_text("{")
    with pytest.raises(ConfigError, match=r"starfish\.json"):
        read_state(tmp_path)


def test_an_instance_that_is_starting_is_said_to_be(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", is_default=False)
    with pytest.raises(ConfigError, match="is starting"):
        resolve_target(store=None, instance=None, run_dir=folder.path)
    folder.remove_files(keep_logs=False)
    with pytest.raises(ConfigError, match="no instance runs from"):
        resolve_target(store=None, instance=None, run_dir=folder.path)
    (folder.path / LOCK_FILE).write_text(f"{2**22 + 1}\n")  # no process has so high a number
    with pytest.raises(ConfigError, match="no instance runs from"):
        resolve_target(store=None, instance=None, run_dir=folder.path)
