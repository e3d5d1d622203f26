"""Whoever can list processes sees their arguments, and support files hold configurations: so no
option takes a secret, only the name of a file with one."""

from __future__ import annotations

import dataclasses
import re

import pytest

from control_plane.config import ControlPlaneConfig
from gateway.config import GatewayConfig
from gpu_worker.config import RankConfig
from node_agent.config import AgentConfig

_SECRET = re.compile(r"secret|passw|credential|api_?key|private_?key|auth|hmac|salt")
_BY_NAME = re.compile(r"_(file|folder|dir|path|fd)$")


@pytest.mark.parametrize("config", [AgentConfig, ControlPlaneConfig, GatewayConfig, RankConfig])
def test_no_option_takes_a_secret_itself(config: type) -> None:
    taken = [
        each.name
        for each in dataclasses.fields(config)
        if _SECRET.search(each.name) and each.type not in ("bool", bool)
    ]
    assert [name for name in taken if not _BY_NAME.search(name)] == []
