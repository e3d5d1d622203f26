"""What each command asks of the admin API, and of whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cli.__main__ import app
from cli.admin import follow
from cli.admin.follow import Manner, Wish
from cli.run_dir import RunState, Target, write_state
from control_plane.admin.bodies import (
    ChangeBody,
    DrainBody,
    PauseBody,
    RebalanceBody,
    ReplaceBody,
    RestartBody,
    ResumeBody,
    ScaleBody,
    UndrainBody,
)
from shared.clock import Clock
from tests.unit.control_plane.desired import agent, state_of

BODIES: dict[str, type[ChangeBody]] = {
    "scale": ScaleBody,
    "drain": DrainBody,
    "undrain": UndrainBody,
    "replace": ReplaceBody,
    "restart": RestartBody,
    "pause": PauseBody,
    "resume": ResumeBody,
    "rebalance": RebalanceBody,
}
ELSEWHERE = ("--admin-url", "http://h:1", "--admin-token-file", "/token")
Asked = list[tuple[Target, Wish, Manner]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    seen: Asked = []

    async def carry_out(target: Target, wish: Wish, manner: Manner, clock: Clock) -> int:
        seen.append((target, wish, manner))
        return 0

    monkeypatch.setattr(follow, "carry_out", carry_out)
    return seen


@pytest.mark.parametrize(
    ("line", "name", "fields"),
    [
        ("scale 5", "scale", {"ranks": 5, "grace_s": 30.0}),
        ("scale --add 2 --node b", "scale", {"add": 2, "node": "b", "grace_s": 30.0}),
        ("scale --remove 1 --remove 3", "scale", {"remove": [1, 3], "grace_s": 30.0}),
        ("drain 2 --grace 5", "drain", {"rank": 2, "grace_s": 5.0}),
        ("drain host-1", "drain", {"node": "host-1", "grace_s": 30.0}),
        ("undrain 2", "undrain", {"rank": 2}),
        ("replace 2 --node b", "replace", {"rank": 2, "node": "b", "grace_s": 30.0}),
        ("restart --rolling", "restart", {"rolling": True, "grace_s": 30.0}),
        (
            "restart --rolling --rank 1",
            "restart",
            {"rolling": True, "ranks": [1], "grace_s": 30.0},
        ),
        ("restart --stop", "restart", {"stop": True}),
        ("pause", "pause", {}),
        ("resume", "resume", {}),
        ("rebalance", "rebalance", {}),
    ],
)
def test_a_command_asks_what_the_control_plane_understands(
    asked: Asked, line: str, name: str, fields: dict[str, Any]
) -> None:
    result = CliRunner().invoke(app, [*line.split(), *ELSEWHERE])
    assert result.exit_code == 0, result.output
    ((_, wish, manner),) = asked
    assert (wish.name, dict(wish.fields)) == (name, fields)
    assert (manner.waits, manner.as_json) == (True, False)
    msgspec.convert(fields, type=BODIES[name]).change(state_of(agent("a", 0, 1, 2, 3)))


@pytest.mark.parametrize(
    "line",
    [
        "drain",
        "restart",
        "restart --rolling --stop",
        "restart --stop --rank 1",
        "restart --rolling --rank 5000",
        "replace 2",
        "replace 5000 --node b",
        "scale",
        "scale x",
        "scale 0",
        "scale 5000",
        "scale 3 --add 2",
        "scale --add 0",
        "scale --add-rank 4096",
        "scale --remove 1 --add 1",
        "scale --remove 1 --node b",
        "drain 1 --grace x",
        "drain 1 --grace -1",
        "drain 1 --grace 1e9",
        "drain 1 --timeout -3",
        "drain 4096",
        f"drain {'n' * 254}",
    ],
)
def test_a_wrong_command_line_has_code_2_and_asks_nothing(asked: Asked, line: str) -> None:
    result = CliRunner().invoke(app, [*line.split(), *ELSEWHERE])
    assert (result.exit_code, "$." in result.output) == (2, False), result.output
    assert asked == []


def test_address_and_token_are_enough_and_flags_say_how_to_wait(asked: Asked) -> None:
    line = ["drain", "1", *ELSEWHERE, "--no-wait", "--timeout", "3", "--json"]
    assert CliRunner().invoke(app, line).exit_code == 0
    ((target, _, manner),) = asked
    assert (target.admin_url, target.admin_token_file) == ("http://h:1", Path("/token"))
    assert manner == Manner(waits=False, timeout_s=3.0, as_json=True)


def test_the_run_folder_says_where_the_admin_api_is(asked: Asked, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    state = RunState(
        instance="i",
        etcd="e:1",
        url="u",
        pid=1,
        model="m",
        admin_url="http://127.0.0.1:5",
        admin_token_file=str(folder / "admin-token"),
    )
    write_state(folder, state)
    assert CliRunner().invoke(app, ["pause", "--run-dir", str(folder)]).exit_code == 0
    ((target, _, _),) = asked
    assert target.admin_url == "http://127.0.0.1:5"
    assert target.admin_token_file == folder / "admin-token"
    assert (target.instance, target.etcd) == ("i", "e:1")


def test_without_an_instance_it_says_what_to_do(asked: Asked, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["pause", "--run-dir", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert asked == []
