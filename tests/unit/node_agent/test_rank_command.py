"""From an agent's options to its ranks' command line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from node_agent.__main__ import parse, rank_command
from shared.errors import ConfigError
from shared.types import Incarnation, Member, RankId


def rank_flags(arguments: Sequence[str]) -> dict[str, str]:
    """The flags of rank 9's command line, the last one of each name."""
    config, after = parse([*arguments])
    argv = rank_command(config, after).argv(Member(rank=RankId(9), incarnation=Incarnation(1)), 5)
    return {flag: value for flag, value in itertools.pairwise(argv) if flag[:2] == "--"}


def test_an_agent_hands_on_what_its_host_has() -> None:
    flags = rank_flags(
        ["--device", "cuda", "--transfer-protocol", "rdma", "--mooncake-ib-device", "mlx5_0"]
    )
    assert flags["--device"] == "cuda"
    assert flags["--transfer-protocol"] == "rdma"
    assert flags["--mooncake-ib-device"] == "mlx5_0"


def test_what_is_not_said_is_left_to_the_rank() -> None:
    assert not {"--device", "--transfer-protocol", "--mooncake-ib-device"} & set(rank_flags([]))


def test_each_rank_has_its_own_control_port() -> None:
    assert rank_flags(["--ranks", "8-15", "--control-port", "7000"])["--control-port"] == "7001"
    assert "--control-port" not in rank_flags(["--ranks", "8-15"])


def test_ranks_reach_etcd_as_their_own_user(tmp_path: Path) -> None:
    for name in ("ca.pem", "agent.pem", "agent.key", "rank.pem", "rank.key"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o600)
    agent = ["--etcd-cert", f"{tmp_path}/agent.pem", "--etcd-key", f"{tmp_path}/agent.key"]
    rank = ["--rank-etcd-cert", f"{tmp_path}/rank.pem", "--rank-etcd-key", f"{tmp_path}/rank.key"]
    flags = rank_flags(["--etcd-ca", f"{tmp_path}/ca.pem", *agent, *rank])
    assert flags["--etcd-ca"] == f"{tmp_path}/ca.pem"
    assert flags["--etcd-cert"] == f"{tmp_path}/rank.pem"
    assert flags["--etcd-key"] == f"{tmp_path}/rank.key"
    assert rank_flags(["--etcd-ca", f"{tmp_path}/ca.pem", *agent])["--etcd-cert"].endswith(
        "agent.pem"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "0-9", "--control-port", "65530"],
        ["--device", "tpu"],
        ["--transfer-protocol", "udp"],
        ["--rank-etcd-cert", "/none.pem"],
    ],
)
def test_an_impossible_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse(arguments)
