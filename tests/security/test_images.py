"""What the container files promise: nothing unpinned, no compiler in the final image, no container
with rights, a writable root or without limits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCKED = dict(
    re.findall(
        r"^([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$",
        (ROOT / "requirements.lock").read_text(),
        re.MULTILINE,
    )
)


def composed() -> dict[str, dict[str, object]]:
    compose = Path(sys.executable).with_name("docker-compose")
    if not compose.exists():
        pytest.skip("needs the extra `dev`")
    command = [str(compose), "-f", str(ROOT / "docker-compose.yml"), "config", "--format", "json"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    services: dict[str, dict[str, object]] = json.loads(done.stdout)["services"]
    return services


def test_every_line_of_the_lock_has_a_version_and_a_hash() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert len(LOCKED) == len([line for line in lines if not line.startswith("#")])


def test_the_lock_has_what_the_project_asks_for() -> None:
    """If not, run `python tests/compose/write_lock.py`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = dict(line.split("==") for line in project["dependencies"])
    torch = wanted.pop("torch")
    assert {name: LOCKED.get(name) for name in wanted} == wanted
    assert f"torch=={torch}" in DOCKERFILE


def test_the_final_image_has_no_compiler_and_no_code_of_its_users() -> None:
    build, final = DOCKERFILE.split("FROM ${BASE_IMAGE}\n")
    assert " gcc " in build
    assert "python -m shared.confinement" in build
    assert "chmod -R go-w" in build
    assert not re.search(r"\b(gcc|g\+\+|clang|libc6-dev|build-essential|pip install)\b", final)
    assert "chown" not in DOCKERFILE
    assert "--chown" not in final
    assert "USER 1000:1000" in final


def test_every_container_is_confined() -> None:
    for name, service in composed().items():
        assert service.get("read_only") is True, name
        assert service.get("cap_drop") == ["ALL"], name
        assert service.get("security_opt") == ["no-new-privileges:true"], name
        assert service.get("mem_limit"), name
        assert service.get("pids_limit"), name
        assert not service.get("privileged"), name
        assert not service.get("cap_add"), name
        mounts = [str(volume) for volume in service.get("volumes", [])]  # type: ignore[attr-defined]
        assert not any("docker.sock" in mount for mount in mounts), name


def test_only_gateways_are_published_and_on_loopback() -> None:
    published = {name: each["ports"] for name, each in composed().items() if each.get("ports")}
    assert list(published) == ["gateway"]
    assert [port["host_ip"] for port in published["gateway"]] == ["127.0.0.1"]  # type: ignore[attr-defined]
