"""`write_lock.py`: writes requirements.lock, from which the image installs: every package that
pyproject.toml asks for and all that those need, with version and SHA-256, for x86-64 and Python
3.11. Without torch, which has a build for each kind of card. Run it when a dependency changes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
_HEAD = "# Written by tests/compose/write_lock.py. x86-64, Python 3.11; torch is not among them.\n"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), *project["dependencies"]]
        subprocess.run(command, check=True, cwd=folder)
        found = json.loads(report.read_text())["install"]
    lines = []
    for package in found:
        name, version = package["metadata"]["name"].lower(), package["metadata"]["version"]
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        if name != "torch" and not name.startswith("nvidia-"):
            lines.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{digest}\n")
    LOCK.write_text(_HEAD + "".join(sorted(lines)))


if __name__ == "__main__":
    main()
