"""`write_locks.py`: writes requirements/*.lock, from which the images install: every package that
is asked for and all that those need, with version and SHA-256, for x86-64 and Python 3.11. `make
lock` runs it when a dependency has changed.

torch has a build for CPUs and one for CUDA. The one for CUDA is the default index's; the one for
CPUs is what pip finds for this checkout. Any machine may find the other one under the same version,
so `torch-cpu.lock` names the hash of the former alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "requirements"
CPU_MOONCAKE = "mooncake-transfer-engine-non-cuda"
CUDA_ONLY = ("mooncake-transfer-engine-cuda13==0.3.14", "cuda-toolkit[nvcc,cccl]==13.0.*")
BUILD = ("setuptools>=77",)
SBOM_TOOL = ("cyclonedx-bom==7.5.0",)
_HEAD = "# Written by `make lock` (tests/compose/write_locks.py) for x86-64 and Python 3.11.\n"
_OF_CUDA = ("torch", "triton", "nvidia-", "cuda-")

Locked = Mapping[str, str]
"""Lines by name of the package."""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["otel"], *BUILD]
    found = resolve(wanted)
    write("cpu.lock", {n: line for n, line in found.items() if not n.startswith(_OF_CUDA)})
    write("torch-cpu.lock", {"torch": found["torch"]})
    without_cpu = [each for each in wanted if not each.startswith(CPU_MOONCAKE)]
    # From the default index alone, whatever this machine is set up to prefer.
    elsewhere = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    default_index = {**elsewhere, "PIP_CONFIG_FILE": os.devnull}
    write("cuda.lock", resolve([*without_cpu, *CUDA_ONLY], default_index))
    write("sbom.lock", resolve(SBOM_TOOL))


def resolve(wanted: Sequence[str], environment: Mapping[str, str] | None = None) -> Locked:
    """Asks pip, which installs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), *wanted]
        subprocess.run(command, check=True, cwd=folder, env=environment)
        found = json.loads(report.read_text())["install"]
    return dict(sorted(_line(package) for package in found))


def _line(package: Mapping[str, Any]) -> tuple[str, str]:
    name = package["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
    version = package["metadata"]["version"].partition("+")[0]  # "+cpu" names a build
    digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
    return name, f"{name}=={version} --hash=sha256:{digest}\n"


def write(name: str, locked: Locked) -> None:
    LOCKS.mkdir(exist_ok=True)
    (LOCKS / name).write_text(_HEAD + "".join(locked.values()))


if __name__ == "__main__":
    main()
