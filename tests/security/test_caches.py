"""Code that Starfish loads from a cache: another user's is never taken, and a read-only root and a
user without a home folder do not stop a rank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shared import confinement
from shared.confinement import (
    build_shim_beside_source,
    confined_environment,
    find_shim,
    require_internal,
)
from shared.errors import ConfigError
from shared.private_folder import cache_folder

ROOT = Path(__file__).parents[2]
STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def planted_shim(cache: Path) -> Path:
    """Another user's code under the name of ours."""
    folder = cache / "starfish"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / confinement.shim_name()
    path.write_bytes(b"not ours")
    path.chmod(0o755)
    return path


@as_root
def test_a_shim_of_another_user_is_replaced(tmp_path: Path) -> None:
    path = planted_shim(tmp_path)
    os.chown(path, STRANGER, STRANGER)
    assert find_shim({"XDG_CACHE_HOME": str(tmp_path)}) == path
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert path.stat().st_uid == os.geteuid()


def test_a_shim_that_others_can_write_is_replaced(tmp_path: Path) -> None:
    path = planted_shim(tmp_path)
    path.chmod(0o777)
    find_shim({"XDG_CACHE_HOME": str(tmp_path)})
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert path.stat().st_mode & 0o222 == 0


def test_a_shim_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    path = planted_shim(tmp_path)
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)
    find_shim({"XDG_CACHE_HOME": str(tmp_path)})
    assert not path.is_symlink()
    assert target.read_bytes() == b"not ours"


@as_root
def test_a_cache_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "starfish").mkdir()
    os.chown(tmp_path / "starfish", STRANGER, STRANGER)
    with pytest.raises(ConfigError, match="belongs to another user"):
        find_shim({"XDG_CACHE_HOME": str(tmp_path)})


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "starfish").mkdir()
    (tmp_path / "starfish").chmod(0o777)
    with pytest.raises(ConfigError, match="other users have access"):
        find_shim({"XDG_CACHE_HOME": str(tmp_path)})


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shim's source in a folder of the test's own, as in an image."""
    copy = Path(shutil.copy(ROOT / "shared" / "bind_shim.c", tmp_path / "bind_shim.c"))
    monkeypatch.setattr(confinement, "_SOURCE", copy)
    return copy


def test_a_shim_built_into_an_image_needs_neither_compiler_nor_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = source.with_name(confinement.shim_name())
    build_shim_beside_source()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert find_shim({"XDG_CACHE_HOME": "/proc/no/folder"}) == built


@as_root
def test_a_shim_beside_the_source_is_checked_too(source: Path) -> None:
    built = source.with_name(confinement.shim_name())
    build_shim_beside_source()
    os.chown(built, STRANGER, STRANGER)
    with pytest.raises(ConfigError, match="code that other users can change"):
        find_shim({})


def test_without_a_home_folder_the_cache_is_the_users_own_in_tmp(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    expected = Path(f"/tmp/starfish-{os.geteuid()}/cache")
    assert cache_folder({}) == expected
    assert cache_folder({"HOME": str(tmp_path / "home")}) == expected, "it cannot be written"
    assert cache_folder({"XDG_CACHE_HOME": "/c", "HOME": "/root"}) == Path("/c/starfish")


KERNEL = """from gpu_worker.cpu.kernels.arithmetic import kernel


@kernel
def twice(x):
    return x + x
"""
# Whoever runs the tests may have Python where other users cannot read it: it is loaded first.
USE_KERNEL = """
import os, sys, numba, numpy as np
numba.njit(lambda x: x + x)(np.float32(1))
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
from gpu_worker.cpu.probe_kernel import twice
print(twice(np.float32(4)), sum(twice.stats.cache_hits.values()))
"""


@as_root
def test_kernels_of_a_read_only_tree_serve_any_user() -> None:
    """As in an image: root has built the kernels, and a user without a name or a home runs them."""
    own_tmp = Path(f"/tmp/starfish-{STRANGER}")
    shutil.rmtree(own_tmp, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        for package in ("gpu_worker", "shared"):
            shutil.copytree(ROOT / package, tree / package)
        (tree / "gpu_worker" / "cpu" / "probe_kernel.py").write_text(KERNEL)
        Path(folder).chmod(0o755)
        try:
            assert use_kernel(tree, uid=0) == "8.0 0", "compiled"
            assert use_kernel(tree, uid=STRANGER) == "8.0 1", "loaded"
            assert use_kernel(tree, uid=STRANGER) == "8.0 1", "loaded again"
        finally:
            shutil.rmtree(own_tmp, ignore_errors=True)


def use_kernel(tree: Path, *, uid: int) -> str:
    done = subprocess.run(
        [sys.executable, "-c", USE_KERNEL, str(uid)],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("service", ["node_agent", "gpu_worker"])
@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1"])
def test_a_public_data_address_is_refused_at_start(service: str, address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", service, "--data-host", address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 1
    assert "is a public one" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.5", "172.18.0.3", "192.168.1.2"])
def test_an_internal_data_address_is_accepted(address: str) -> None:
    require_internal(address)


def test_the_environment_of_a_rank_names_a_checked_shim(tmp_path: Path) -> None:
    path = planted_shim(tmp_path)
    path.chmod(0o777)
    found = confined_environment({"XDG_CACHE_HOME": str(tmp_path)}, "127.0.0.1")
    assert found["LD_PRELOAD"] == str(path)
    assert path.read_bytes() != b"not ours"
