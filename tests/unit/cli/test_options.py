"""An impossible flag gives one sentence that names the flag."""

from __future__ import annotations

import dataclasses
import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.up.options import UpOptions
from cli.up.services import Service, agent, control_plane, gateway_standby, gateways
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions
from shared.free_ports import free_ports

ETCD = EtcdOptions(etcd="e:1")
OF_RANKS = EtcdOptions(etcd="e:1", etcd_user="ranks")


@pytest.fixture
def free_port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.fixture
def options(tmp_path: Path, free_port: int) -> UpOptions:
    return UpOptions(
        chosen_model_dir=tmp_path,
        redundant_experts=16,
        port=free_port,
        instance="t",
        chosen_run_dir=tmp_path,
        demo=False,
        timeout_s=10.0,
    )


def test_what_is_possible_passes(options: UpOptions) -> None:
    options.check()


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"ranks": 0}, "--ranks"),
        ({"gateways": 0}, "--gateways"),
        ({"gateways": 65}, "--gateways"),
        ({"routing": "fastest"}, "--routing"),
        ({"etcd_user": "u"}, "--etcd"),
        ({"etcd": "h:1", "etcd_user": "u"}, "--etcd-ca"),
        ({"etcd": "h:1", "etcd_cert": Path("c")}, "--etcd-key"),
        ({"etcd": "h:1", "etcd_credentials": Path("/nowhere")}, "etcd-setup"),
        ({"control_planes": 3}, "--control-planes"),
        ({"redundant_experts": -2}, "--redundant-experts"),
        ({"context_tokens_max": -1}, "--context-tokens-max"),
        ({"slots_per_rank": -1}, "--slots-per-rank"),
        ({"speculative_tokens": 2}, "--speculative-tokens"),
        ({"instance": "a/b"}, "--instance"),
        ({"ib_device": "mlx5_0"}, "--mooncake-ib-device"),
        ({"model": Path("/nowhere/at/all")}, "--model"),
        ({"port": 70000}, "--port"),
        ({"host": "203.0.113.1"}, "--host"),
        ({"device": "tpu"}, "--device"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend"),
        ({"elastic_ep_backend": "nccl"}, "--elastic-ep-backend"),
    ],
)
def test_what_is_impossible_is_named(options: UpOptions, change: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        dataclasses.replace(options, **change).check()


def test_a_port_in_use_is_named(options: UpOptions, taken_port: int) -> None:
    with pytest.raises(ConfigError, match=str(taken_port)):
        dataclasses.replace(options, port=taken_port).check()


def test_aliases_of_sglang_mean_mooncake(options: UpOptions) -> None:
    dataclasses.replace(options, elastic_ep_backend="mooncake", moe_a2a_backend="mooncake").check()


def pairs(service: Service) -> set[tuple[str, str]]:
    command = service.command(9)
    return set(itertools.pairwise(command))


def test_every_service_gets_etcd_instance_and_lifeline(options: UpOptions) -> None:
    model = Path("/m")
    for service in (
        control_plane(options, ETCD, model, 0, 6),
        *gateways(options, ETCD, [5]),
        agent(options, ETCD, OF_RANKS, model, Path("/logs")),
    ):
        assert {("--etcd", "e:1"), ("--instance", "t"), ("--lifeline-fd", "9")} <= pairs(service)
        assert ("--secret-file", str(options.run_dir / "secret")) in pairs(service)


def test_control_planes_decide_whether_ranks_draft(options: UpOptions) -> None:
    model = Path("/m")
    drafting = dataclasses.replace(options, speculative_tokens=1)
    assert ("--speculative-tokens", "1") in pairs(control_plane(drafting, ETCD, model, 0, 6))
    plain = control_plane(options, ETCD, model, 0, 6).command(9)
    assert "--speculative-tokens" not in plain


def gateway(options: UpOptions, etcd: EtcdOptions, listen_fd: int) -> Service:
    (only,) = gateways(options, etcd, [listen_fd])
    return only


def test_the_gateway_inherits_the_listening_socket(options: UpOptions) -> None:
    service = gateway(options, ETCD, 5)
    assert ("--listen-fd", "5") in pairs(service)
    assert service.inherited_fds == (5,)
    assert "--own-port" not in service.argv


def test_gateways_have_a_socket_and_a_log_each_and_one_standby(options: UpOptions) -> None:
    changed = dataclasses.replace(options, gateways=2, routing="round-robin")
    first, second = gateways(changed, ETCD, [5, 6])
    standby = gateway_standby(changed, ETCD, [5, 6])
    assert (first.name, second.name) == ("gateway-0", "gateway-1")
    assert (first.inherited_fds, second.inherited_fds) == ((5,), (6,))
    assert {first.standby, second.standby} == {standby.name}
    assert (first.standby_word, second.standby_word) == ("5", "6")
    assert standby.inherited_fds == (5, 6)
    assert {("--own-port", "0"), ("--routing", "round-robin")} <= pairs(first)


@pytest.mark.parametrize("number", [1, 2, 64])
def test_a_standby_has_room_for_the_command_line_that_it_takes_over(
    options: UpOptions, number: int
) -> None:
    fds = list(range(5, 5 + number))
    waiting = gateway_standby(options, ETCD, fds).command(9, 4)
    for service in gateways(options, ETCD, fds):
        assert len("\0".join(service.command(9))) <= len("\0".join(waiting))


def test_the_gateway_is_told_how_to_read_chats(options: UpOptions, tmp_path: Path) -> None:
    assert "--chat-template" not in gateway(options, ETCD, 5).argv
    template = tmp_path / "chat.jinja"
    changed = dataclasses.replace(options, chat_template=template, trust_special_tokens=False)
    argv = gateway(changed, ETCD, 5).argv
    assert argv[argv.index("--chat-template") + 1] == str(template)
    assert "--no-trust-special-tokens" in argv
    with pytest.raises(ConfigError, match="--chat-template"):
        changed.check()


def test_the_gateway_is_told_how_to_read_calls_and_reasoning(options: UpOptions) -> None:
    assert "--tool-call-parser" not in gateway(options, ETCD, 5).argv
    changed = dataclasses.replace(options, tool_call_parser="hermes", reasoning_parser="qwen3")
    chosen = {("--tool-call-parser", "hermes"), ("--reasoning-parser", "qwen3")}
    assert chosen <= pairs(gateway(changed, ETCD, 5))


def test_the_gateway_gets_the_file_of_api_keys(options: UpOptions, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    changed = dataclasses.replace(options, api_key_file=file)
    assert ("--api-key-file", str(file)) in pairs(gateway(changed, ETCD, 5))
    assert "--api-key-file" not in gateway(options, ETCD, 5).command(9)
    with pytest.raises(ConfigError, match="--api-key-file"):
        changed.check()
    file.touch(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        changed.check()
    file.chmod(0o600)
    changed.check()


@pytest.mark.parametrize(
    ("host", "has_keys", "is_open"),
    [
        ("127.0.0.1", False, False),
        ("localhost", False, False),
        ("::1", False, False),
        ("0.0.0.0", False, True),
        ("10.0.0.1", False, True),
        ("0.0.0.0", True, False),
    ],
)
def test_who_serves_everybody_is_told(
    options: UpOptions, host: str, has_keys: bool, is_open: bool
) -> None:
    keys = Path("/keys.toml") if has_keys else None
    assert dataclasses.replace(options, host=host, api_key_file=keys).is_open_to_all == is_open


def test_flags_of_ranks_stand_after_the_agents_own(options: UpOptions) -> None:
    changed = dataclasses.replace(options, static=True, kv_tokens=4096)
    command = agent(changed, ETCD, OF_RANKS, Path("/m"), Path("/logs")).command(9)
    tail = command[command.index("--") + 1 :]
    assert tail == [
        "--etcd",
        "e:1",
        "--etcd-user",
        "ranks",
        "--transfer-protocol",
        "tcp",
        "--static",
        "--kv-tokens",
        "4096",
    ]


def test_ranks_choose_their_device_unless_told(options: UpOptions) -> None:
    told = dataclasses.replace(options, device="cuda")
    tail = agent(told, ETCD, OF_RANKS, Path("/m"), Path("/logs")).tail
    assert tail == ("--", *OF_RANKS.flags(), "--transfer-protocol", "tcp", "--device", "cuda")
    assert "--device" not in agent(options, ETCD, OF_RANKS, Path("/m"), Path("/logs")).tail


def test_the_agent_creates_the_expert_caches_memory(options: UpOptions) -> None:
    command = agent(
        dataclasses.replace(options, host_experts_gb=1.5), ETCD, OF_RANKS, Path("/m"), Path("/logs")
    ).command(9)
    own = command[: command.index("--")]
    assert ("--host-experts-gb", "1.5") in itertools.pairwise(own)


def test_an_environment_for_the_ranks_is_given_to_their_agent(options: UpOptions) -> None:
    shared = {"CUDA_MPS_PIPE_DIRECTORY": "/p"}
    assert agent(options, ETCD, OF_RANKS, Path("/m"), Path("/logs"), shared).environment == shared


def test_redundancy_is_the_control_planes_choice_unless_given(options: UpOptions) -> None:
    given = control_plane(options, ETCD, Path("/m"), 0, 6).argv
    assert given[given.index("--redundant-experts") + 1] == "16"
    default = dataclasses.replace(options, redundant_experts=-1)
    assert "--redundant-experts" not in control_plane(default, ETCD, Path("/m"), 0, 6).argv


def test_control_planes_get_the_admin_apis_certificate_and_whom_to_believe(
    options: UpOptions, tmp_path: Path
) -> None:
    assert "--admin-ca" not in control_plane(options, ETCD, tmp_path, 0, 7).argv
    certificate, key, authority = (tmp_path / name for name in ("c.pem", "k.pem", "ca.pem"))
    half = dataclasses.replace(options, admin_tls_cert=certificate)
    with pytest.raises(ConfigError, match="--admin-tls-key"):
        half.check()
    tls = dataclasses.replace(half, admin_tls_key=key)
    given = {("--admin-tls-cert", str(certificate)), ("--admin-tls-key", str(key))}
    own = pairs(control_plane(tls, ETCD, tmp_path, 0, 7))
    assert given | {("--admin-ca", str(certificate))} <= own  # it may have signed itself
    signed = dataclasses.replace(tls, admin_ca=authority)
    assert ("--admin-ca", str(authority)) in pairs(control_plane(signed, ETCD, tmp_path, 0, 7))
