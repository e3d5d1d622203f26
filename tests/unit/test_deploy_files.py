"""The files in `deploy/` name options that exist, and the services accept them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from control_plane.config import ControlPlaneConfig
from gateway.config import GatewayConfig
from gpu_worker.config import RankConfig
from node_agent.config import AgentConfig
from shared.config import load_config

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
SECTIONS: dict[str, type[Any]] = {
    "agent": AgentConfig,
    "control_plane": ControlPlaneConfig,
    "gateway": GatewayConfig,
    "rank": RankConfig,
}


def environment(name: str) -> dict[str, str]:
    """As systemd reads it."""
    lines = (SYSTEMD / "examples" / name).read_text().splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {variable: value for variable, _, value in pairs}


@pytest.mark.parametrize(
    ("section", "files"),
    [
        ("agent", ("common.env", "agent.env")),
        ("rank", ("common.env", "agent.env")),
        ("control_plane", ("common.env", "control-plane.env")),
        ("gateway", ("common.env", "gateway.env")),
    ],
)
def test_a_service_takes_the_environment_of_its_example(
    section: str, files: tuple[str, ...]
) -> None:
    environ = {key: value for name in files for key, value in environment(name).items()}
    config = load_config(SECTIONS[section], section=section, file=None, environ=environ, flags={})
    assert config != SECTIONS[section]()


def test_every_variable_of_an_example_is_one_of_a_service() -> None:
    prefixes = tuple(f"STARFISH_{section.upper()}_" for section in SECTIONS)
    names = {
        key
        for name in ("common", "agent", "control-plane", "gateway")
        for key in environment(f"{name}.env")
    }
    assert {key for key in names if not key.startswith(prefixes)} == {
        "FLAGS",
        "STARFISH_ADMIN_URL",
        "STARFISH_ADMIN_TOKEN_FILE",
    }


def test_a_unit_reads_the_examples_that_lie_beside_it() -> None:
    examples = {path.name for path in (SYSTEMD / "examples").iterdir()}
    read = {
        Path(line.partition("=")[2]).name
        for unit in SYSTEMD.glob("*.service")
        for line in unit.read_text().splitlines()
        if line.startswith("EnvironmentFile=")
    }
    assert read == examples
