"""The command lines with which `starfish up` starts the processes of an instance."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.up.options import UpOptions
from shared.etcd_options import EtcdOptions

GATEWAY_STANDBY = "gateway-standby"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """`argv` lacks the lifeline, whose descriptor is known only at the start. `standby` names the
    `Standby` that takes over, if there is one, and `standby_word` tells it what: also when the
    service says by `handover_fd` that it is about to end."""

    name: str
    argv: tuple[str, ...]
    stop_timeout_s: float
    tail: tuple[str, ...] = ()  # comes after the lifeline
    environment: Mapping[str, str] = field(default_factory=dict)  # added to ours
    inherited_fds: tuple[int, ...] = ()
    standby: str = ""
    standby_word: str = ""

    def command(self, lifeline_fd: int, handover_fd: int = -1) -> list[str]:
        handover = _handover(handover_fd) if self.standby else ()
        return [*self.argv, "--lifeline-fd", str(lifeline_fd), *handover, *self.tail]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """A process that waits, as `shared.standby` has it, to take over from any service that names
    it."""

    name: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    inherited_fds: tuple[int, ...]

    def command(self, lifeline_fd: int, begin_fd: int, handover_fd: int = -1) -> list[str]:
        flags = ("--lifeline-fd", str(lifeline_fd), *_handover(handover_fd))
        return [*self.program, str(begin_fd), *self.arguments, *flags]


def control_plane(
    options: UpOptions, etcd: EtcdOptions, model: Path, number: int, admin_fd: int
) -> Service:
    """`admin_fd` is our listening socket for the admin API, which all of them share: whoever leads,
    its address stays."""
    slots = ("--slots-per-rank", str(options.slots_per_rank)) if options.slots_per_rank else ()
    redundant, context = options.redundant_experts, options.context_tokens_max
    drafts = options.speculative_tokens
    return Service(
        name=f"control-plane-{number}",
        argv=(
            *(sys.executable, "-m", "control_plane"),
            *(*etcd.flags(), "--instance", options.instance, "--model", str(model)),
            *("--secret-file", str(options.secret_file)),
            *("--ranks", str(options.ranks), *slots),
            *(("--ranks-max", str(options.ranks_max)) if options.ranks_max else ()),
            *(("--redundant-experts", str(redundant)) if redundant >= 0 else ()),
            *(("--context-tokens-max", str(context)) if context else ()),
            *(("--speculative-tokens", str(drafts)) if drafts else ()),
            *("--admin-host", options.admin_host, "--admin-port", "0"),
            *("--admin-token-file", str(options.admin_token_file)),
            *_given("--admin-tls-cert", options.admin_tls_cert),
            *_given("--admin-tls-key", options.admin_tls_key),
            *_given("--admin-ca", options.admin_authority),
            *("--admin-listen-fd", str(admin_fd)),
            *(("--allow-kill",) if options.allow_kill else ()),
            *(("--port", str(options.metrics_ports[number])) if options.metrics_port else ()),
            *log_flags(options),
        ),
        inherited_fds=(admin_fd,),
        stop_timeout_s=5.0,
    )


def gateways(options: UpOptions, etcd: EtcdOptions, listen_fds: Sequence[int]) -> list[Service]:
    """One for each of `listen_fds`, our listening sockets on one port. Clients that the kernel gave
    to the socket of a gateway that has died wait in its queue for the successor."""
    return [
        Service(
            name="gateway" if len(listen_fds) == 1 else f"gateway-{number}",
            argv=(
                *(sys.executable, "-m", "gateway", "--listen-fd", str(listen_fd)),
                *_gateway_flags(options, etcd),
            ),
            inherited_fds=(listen_fd,),
            stop_timeout_s=options.drain_s + 5.0,
            standby=GATEWAY_STANDBY,
            standby_word=str(listen_fd),
        )
        for number, listen_fd in enumerate(listen_fds)
    ]


def gateway_standby(options: UpOptions, etcd: EtcdOptions, listen_fds: Sequence[int]) -> Standby:
    """One for all gateways: that several die at once is rare, and costs only the start."""
    return Standby(
        name=GATEWAY_STANDBY,
        program=(sys.executable, "-m", "gateway.standby"),
        arguments=(
            *("--listen-fd", ",".join(map(str, listen_fds))),
            *_gateway_flags(options, etcd),
        ),
        inherited_fds=tuple(listen_fds),
    )


def _gateway_flags(options: UpOptions, etcd: EtcdOptions) -> tuple[str, ...]:
    """All but the socket."""
    return (
        *(*etcd.flags(), "--instance", options.instance),
        *("--secret-file", str(options.secret_file)),
        *("--drain-s", str(options.drain_s), "--routing", options.routing),
        *(("--own-port", "0") if options.gateways > 1 else ()),
        *_given("--served-model-name", options.served_model_name),
        *_given("--chat-template", options.chat_template),
        *(() if options.trust_special_tokens else ("--no-trust-special-tokens",)),
        *_given("--tool-call-parser", options.tool_call_parser),
        *_given("--reasoning-parser", options.reasoning_parser),
        *_given("--cors-origins", options.cors_origins),
        *_given("--tls-cert", options.tls_cert),
        *_given("--tls-key", options.tls_key),
        *_given("--otlp-endpoint", options.otlp_endpoint),
        *_given("--api-key-file", options.api_key_file and options.api_key_file.absolute()),
        *log_flags(options),
    )


def log_flags(options: UpOptions) -> tuple[str, ...]:
    return ("--log-level", options.log_level, *(("--log-json",) if options.log_json else ()))


def _handover(fd: int) -> tuple[str, ...]:
    return ("--handover-fd", str(fd)) if fd >= 0 else ()


def _given(flag: str, value: object) -> tuple[str, ...]:
    """The flag with its value, if it has one."""
    return (flag, str(value)) if value else ()


def agent(
    options: UpOptions,
    etcd: EtcdOptions,
    rank_etcd: EtcdOptions,
    model: Path,
    log_dir: Path,
    environment: Mapping[str, str] | None = None,
) -> Service:
    """The agent's ranks inherit `environment`."""
    host_gb = options.host_experts_gb
    rank_flags = [*rank_etcd.flags(), "--transfer-protocol", options.transfer_protocol]
    if options.device != "auto":
        rank_flags += ["--device", options.device]
    if options.ib_device:
        rank_flags += ["--mooncake-ib-device", options.ib_device]
    if options.static:
        rank_flags.append("--static")
    rank_flags += _given("--otlp-endpoint", options.otlp_endpoint)
    if options.kv_tokens is not None:
        rank_flags += ["--kv-tokens", str(options.kv_tokens)]
    if options.kv_cache_dtype != "auto":
        rank_flags += ["--kv-cache-dtype", options.kv_cache_dtype]
    return Service(
        name="agent",
        argv=(
            *(sys.executable, "-m", "node_agent"),
            *(*etcd.flags(), "--instance", options.instance, "--model", str(model)),
            *("--secret-file", str(options.secret_file)),
            *("--ranks", f"0-{options.ranks - 1}", "--log-dir", str(log_dir)),
            *(("--host-experts-gb", str(host_gb)) if host_gb >= 0 else ()),
            *(("--metrics-port", str(options.metrics_ports[-1])) if options.metrics_port else ()),
            *log_flags(options),
            *("--stop-grace-s", "4", "--leave-grace-s", "0"),
        ),
        stop_timeout_s=8.0,
        tail=("--", *rank_flags),
        environment=environment or {},
    )
