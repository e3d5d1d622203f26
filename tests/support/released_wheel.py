"""The newest wheel of `tests/releases/`, unpacked: the last release, to be run beside this tree."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

TREE = Path(__file__).parents[2]
_WHEELS = TREE / "tests" / "releases"
_UNPACKED = TREE / "var" / "releases"
"""Kept from one run to the next, because its kernels are compiled there."""
_KERNELS = Path("gpu_worker", "cpu", "kernels")
_COMPILED_PACKAGES = (_KERNELS, Path("gpu_worker", "exchange"))
_LOAD_KERNELS = """
import sys
from pathlib import Path
from gpu_worker.cpu.registry import load_kernels
from shared.model_spec import read_model_spec
model = Path(sys.argv[1])
load_kernels(model, read_model_spec(model))
"""


def unpacked_release() -> Path:
    """The folder with its packages. `make release-wheel` renews the wheel."""
    (wheel,) = _WHEELS.glob("*.whl")
    folder = _UNPACKED / wheel.stem
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(folder)
        take_compiled_kernels(folder)
    return folder


def take_compiled_kernels(release: Path) -> None:
    """Those of modules that are the same here, which is most of them: to compile all anew takes a
    minute. Numba keeps them by the path of their module, and believes them if the module's size and
    time are those of when they were compiled. What is missing in the end is compiled."""
    for kept in (TREE / _KERNELS / "__pycache__").glob("kernels-*"):
        for package in _COMPILED_PACKAGES:
            ours, theirs = TREE / package, release / package
            target = release / _KERNELS / "__pycache__" / kept.name / _kept_name(theirs)
            for module in theirs.glob("*.py"):
                own = ours / module.name
                if not own.is_file() or own.read_bytes() != module.read_bytes():
                    continue
                os.utime(module, ns=(own.stat().st_atime_ns, own.stat().st_mtime_ns))
                target.mkdir(parents=True, exist_ok=True)
                for compiled in (kept / _kept_name(ours)).glob(f"{module.stem}.*"):
                    shutil.copy(compiled, target)


def _kept_name(package: Path) -> str:
    return f"{package.name}_{hashlib.sha1(str(package).encode()).hexdigest()}"


def compile_kernels(release: Path, model: Path) -> None:
    """All that a rank of this release needs for the model: a minute for the first time."""
    subprocess.run((sys.executable, "-c", _LOAD_KERNELS, str(model)), cwd=release, check=True)
