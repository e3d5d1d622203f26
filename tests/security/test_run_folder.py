"""Another user of this host takes predictable names before us: the run folder, a link on the way to
it, the state file. Nothing of anybody's is read or removed, and `starfish up` says why it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.run_dir import RunState, default_run_dir, read_state, write_state
from cli.up.run_folder import RunFolder
from shared.errors import ConfigError
from shared.private_folder import PrivateFolder, open_folder

ROOT = Path(__file__).parents[2]
STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives folders to another user")


@pytest.fixture
def shared_folder(tmp_path: Path) -> Path:
    """As /tmp is."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder with files of ours that nobody may remove."""
    folder = tmp_path / "victim"
    for part in ("etcd", "logs", "mps"):
        (folder / part).mkdir(parents=True)
        (folder / part / "precious").write_text("kept")
    yield folder
    kept = sorted(path.parent.name for path in folder.rglob("precious"))
    assert kept == ["etcd", "logs", "mps"]


def fails(path: Path, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RunFolder(path, is_default=True)


@as_root
@pytest.mark.parametrize("owner", [0, STRANGER])
def test_up_follows_no_link_in_a_folder_that_a_stranger_made(
    shared_folder: Path, victim: Path, owner: int
) -> None:
    planted = shared_folder / "starfish"
    planted.mkdir()
    (planted / "default").symlink_to(victim)
    os.chown(planted, owner, owner)
    done = subprocess.run(
        [sys.executable, "-m", "cli", "up", "--no-demo", "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "XDG_RUNTIME_DIR": str(shared_folder)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 1
    assert "pass --run-dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_link_in_the_middle_that_anybody_may_have_placed(
    shared_folder: Path, victim: Path
) -> None:
    (shared_folder / "starfish").symlink_to(victim.parent)
    fails(shared_folder / "starfish" / "victim", "symbolic link")


def test_a_link_as_the_folder_itself(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "run").symlink_to(victim)
    fails(tmp_path / "run", "symbolic link")


@as_root
def test_a_folder_of_a_stranger_as_a_component(shared_folder: Path) -> None:
    (shared_folder / "starfish").mkdir()
    os.chown(shared_folder / "starfish", STRANGER, STRANGER)
    fails(shared_folder / "starfish" / "default", "belongs to another user")


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o710])
def test_a_folder_that_others_can_enter(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    fails(tmp_path / "run", "chmod 700")


def test_a_component_in_which_others_may_rename(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    fails(tmp_path / "open" / "run", "written by other users")


@as_root
def test_a_component_that_another_group_may_write(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    os.chown(tmp_path / "open", 0, STRANGER)
    (tmp_path / "open").chmod(0o775)
    fails(tmp_path / "open" / "run", "written by other users")


def test_what_is_created_is_for_this_user_alone(shared_folder: Path) -> None:
    old = os.umask(0)
    try:
        folder = RunFolder(shared_folder / "starfish" / "default", is_default=True)
    finally:
        os.umask(old)
    made = [folder.path.parent, folder.path, folder.log_dir]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3
    folder.remove_files(keep_logs=False)
    assert not folder.path.exists()


def test_an_own_link_among_own_folders_is_followed(tmp_path: Path) -> None:
    """A home folder may be one."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "home").symlink_to("real")
    os.close(open_folder(tmp_path / "home" / "run", create=True, private=True))
    assert (tmp_path / "real" / "run").is_dir()


def test_links_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="too many symbolic links"):
        open_folder(tmp_path / "a" / "run")


def test_a_name_that_was_exchanged_meanwhile_is_not_removed(
    shared_folder: Path, victim: Path
) -> None:
    """A cleaner of old files in /tmp may remove the folder of a run that goes on for weeks."""
    folder = PrivateFolder(shared_folder / "starfish" / "default")
    (shared_folder / "starfish").rename(shared_folder / "old")
    (shared_folder / "starfish").symlink_to(victim.parent)
    (victim.parent / "default").mkdir()
    folder.remove_part("logs")
    folder.remove()
    assert (victim.parent / "default").is_dir()
    folder.close()


def test_a_part_that_is_a_link_is_removed_and_not_followed(tmp_path: Path, victim: Path) -> None:
    folder = PrivateFolder(tmp_path / "run")
    (folder.path / "logs").symlink_to(victim)
    folder.remove_part("logs")
    assert list(folder.path.iterdir()) == []
    folder.close()


def test_the_cleanup_watchdog_goes_by_descriptor(shared_folder: Path, victim: Path) -> None:
    folder = RunFolder(shared_folder / "starfish" / "victim", is_default=True)
    read_end, write_end = os.pipe()
    script = ROOT / "cli" / "up" / "cleanup_watchdog.py"
    watchdog = subprocess.Popen(
        [sys.executable, "-I", str(script), str(read_end), f"{folder.parent_fd}/victim"],
        pass_fds=[read_end, folder.parent_fd],
    )
    (shared_folder / "starfish").rename(shared_folder / "old")
    (shared_folder / "starfish").symlink_to(victim.parent)
    os.close(write_end)
    assert watchdog.wait(30) == 0
    os.close(read_end)
    assert not (shared_folder / "old" / "victim").exists()


STATE = RunState(instance="default", etcd="evil:1", url="http://evil:2", pid=1, model="/m")


@as_root
def test_a_strangers_state_file_is_not_believed(shared_folder: Path) -> None:
    planted = shared_folder / "starfish" / "default"
    planted.mkdir(parents=True)
    write_state(planted, STATE)
    for path in (planted, planted.parent):
        os.chown(path, STRANGER, STRANGER)
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_state(planted)


def test_a_state_file_in_a_folder_that_anybody_may_write_is_not_believed(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="other users"):
        read_state(tmp_path)


@as_root
def test_root_without_a_session_runs_from_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody else can take the name."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert default_run_dir("blue") == Path("/run/starfish/blue")
