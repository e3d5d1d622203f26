"""What the container files promise: nothing unpinned, no compiler in the final image, no container
with rights, a writable root or without limits."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(path.name for path in REQUIREMENTS.glob("*.lock"))
SCRIPTS = {path.name: path.read_text() for path in REQUIREMENTS.glob("*.sh")}
"""What the Dockerfile runs to install."""
FORMS = ("docker-compose.yml", "docker-compose.cluster.yml")
_LINE = re.compile(r"^([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$", re.MULTILINE)


def locked(name: str) -> dict[str, str]:
    return dict(_LINE.findall((REQUIREMENTS / name).read_text()))


def composed(form: str) -> dict[str, dict[str, object]]:
    compose = Path(sys.executable).with_name("docker-compose")
    if not compose.exists():
        pytest.skip("needs the extra `dev`")
    command = [str(compose), "-f", str(ROOT / form), "config", "--format", "json"]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    services: dict[str, dict[str, object]] = json.loads(done.stdout)["services"]
    return services


def stages() -> dict[str, str]:
    """What the Dockerfile says of each."""
    found = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    return dict(zip(found[1::3], found[2::3], strict=True))


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_of_a_lock_has_a_version_and_a_hash(name: str) -> None:
    lines = (REQUIREMENTS / name).read_text().splitlines()
    assert len(locked(name)) == len([line for line in lines if not line.startswith("#")]) > 0


def test_the_locks_have_what_the_project_asks_for() -> None:
    """If not, run `make lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["otel"]
    wanted = dict(line.split("==") for line in asked)
    cpu = locked("cpu.lock") | locked("torch-cpu.lock")
    assert {name: cpu.get(name) for name in wanted} == wanted
    del wanted["mooncake-transfer-engine-non-cuda"]
    cuda = locked("cuda.lock")
    assert {name: cuda.get(name) for name in wanted} == wanted
    assert {"triton", "mooncake-transfer-engine-cuda13", "nvidia-cuda-nvcc"} <= cuda.keys()


def test_nothing_is_installed_without_a_hash() -> None:
    text = "\n".join((DOCKERFILE, *SCRIPTS.values())).replace("\\\n", " ")
    installs = re.findall(r"pip install (.*?)(?:&&|$)", text, re.M)
    assert len(installs) == 3
    for flags in installs:
        assert "--require-hashes" in flags or "-e ." in flags, flags
        assert "--no-deps" in flags
    locks = re.findall(r"install_locked\.sh (\S+\.lock)", DOCKERFILE)
    assert sorted(locks) == [f"requirements/{name}" for name in LOCKS]


def test_the_final_image_has_no_compiler_and_no_code_of_its_users() -> None:
    found = stages()
    assert list(found) == ["runtime", "build", "build-cpu", "cpu", "build-cuda", "cuda"]
    assert " gcc " in found["build"]
    compilers = r"\b(gcc|g\+\+|clang|libc6-dev|build-essential|pip install)\b"
    assert not re.search(compilers, found["runtime"] + found["cpu"])
    for kind in ("cpu", "cuda"):
        build, final = found[f"build-{kind}"], found[kind]
        assert "COPY . .\nRUN requirements/install_project.sh " in build
        build += SCRIPTS["install_project.sh"]
        assert "python -m shared.confinement" in build
        assert "cyclonedx-py environment" in build
        assert "chmod -R go-w" in build
        assert "USER 1000:1000" in final
    assert "chown" not in DOCKERFILE
    assert "--chown" not in DOCKERFILE


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_torch_keeps_what_it_looks_for_when_it_is_imported(kind: str) -> None:
    command = stages()[f"build-{kind}"].replace("\\\n", " ").partition("install_project.sh ")[2]
    taken_away = shlex.split(command.partition("\n")[0])
    assert "torch/test" in taken_away
    needed = PurePosixPath("torch/bin/torch_shm_manager")
    for path in map(str, (needed, *needed.parents)):
        assert not any(fnmatchcase(path, pattern) for pattern in taken_away)
    # And every build tries.
    assert "import numba, torch" in SCRIPTS["install_project.sh"]


@pytest.mark.parametrize("form", FORMS)
def test_every_container_is_confined(form: str) -> None:
    for name, service in composed(form).items():
        assert service.get("read_only") is True, name
        assert service.get("cap_drop") == ["ALL"], name
        assert service.get("security_opt") == ["no-new-privileges:true"], name
        assert service.get("mem_limit"), name
        assert service.get("pids_limit"), name
        assert not service.get("privileged"), name
        assert not service.get("cap_add"), name
        mounts = [str(volume) for volume in service.get("volumes", [])]  # type: ignore[attr-defined]
        assert not any("docker.sock" in mount for mount in mounts), name


@pytest.mark.parametrize(("form", "entry"), list(zip(FORMS, ("gateway", "balancer"), strict=True)))
def test_only_where_clients_come_in_is_published_and_on_loopback(form: str, entry: str) -> None:
    published = {name: each["ports"] for name, each in composed(form).items() if each.get("ports")}
    assert list(published) == [entry]
    assert [port["host_ip"] for port in published[entry]] == ["127.0.0.1"]  # type: ignore[attr-defined]


def test_each_part_of_the_cluster_has_only_its_own_secrets() -> None:
    own = {"etcd": "etcd", "control": "control-plane", "gateway": "gateway", "host": "rank"}
    for name, service in composed("docker-compose.cluster.yml").items():
        volumes: list[dict[str, object]] = service.get("volumes", [])  # type: ignore[assignment]
        identities = {str(v["source"]) for v in volumes if "identity" in str(v.get("source"))}
        if name != "identities" and name.partition("-")[0] in own and name != "etcd-users":
            assert identities == {f"{own[name.partition('-')[0]]}-identity"}, name
