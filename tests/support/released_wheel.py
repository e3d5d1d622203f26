"""The newest wheel of `tests/releases/`, unpacked: the last release, to be run beside this tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

TREE = Path(__file__).parents[2]
_WHEELS = TREE / "tests" / "releases"
_UNPACKED = TREE / "var" / "releases"
"""Kept from one run to the next, because its kernels are compiled there."""
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
    return folder


def compile_kernels(release: Path, model: Path) -> None:
    """All that a rank of this release needs for the model: a minute for the first time."""
    subprocess.run((sys.executable, "-c", _LOAD_KERNELS, str(model)), cwd=release, check=True)
