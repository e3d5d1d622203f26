"""The configuration of a node agent."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

from node_agent.rank_list import parse_ranks
from shared.config import option
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions

_DYING_POLL_MAX_MS = 1000.0
_PORT_MAX = 65535
_DEVICES = ("auto", "cpu", "cuda")
_PROTOCOLS = ("tcp", "rdma")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Filled from [agent] of the TOML file, STARFISH_AGENT_* and flags. The arguments after `--` go
    to every rank unchanged."""

    node: str = option(
        "", "name of this host, whose ranks may fail together; default: its host name"
    )
    ranks: str = option(
        "0-3",
        "the ranks of this host, such as 0-3 or 0,2, as long as the desired state names none; "
        "empty: it gets those that are to run here",
    )
    ranks_max: int = option(
        0, "for how many ranks this host has room, when ranks are added; 0: for any number"
    )
    store: EtcdOptions = field(default_factory=EtcdOptions)
    instance: str = option("default", "name of the Starfish instance, a prefix in etcd")
    secret_file: Path | None = option(
        None,
        "file with the secret that all processes of the instance share, closed to other users; "
        "without it, whoever reaches a rank's control port is let in",
    )
    rank_etcd_cert: Path | None = option(
        None, "the ranks' own --etcd-cert, whose user may do less than the agent's; default: ours"
    )
    rank_etcd_key: Path | None = option(None, "the key of --rank-etcd-cert")
    model: Path | None = option(
        None, "checkpoint folder, for the ranks; default: the one in the instance's spec"
    )
    device: str = option("auto", "what the ranks run on: cpu, cuda, or auto")
    transfer_protocol: str = option("tcp", "the ranks' Mooncake transport: tcp or rdma")
    mooncake_ib_device: str = option(
        "", "RDMA devices of this host for Mooncake, comma-separated; rdma only"
    )
    control_host: str = option("127.0.0.1", "address of the ranks' control ports")
    control_port: int = option(
        0,
        "control port of the first of the ranks; the others have the next ones, in their order; 0: "
        "each takes a free one",
    )
    data_host: str = option("127.0.0.1", "address of the ranks' data network")
    public_data_host: bool = option(
        False, "accept a public address as --data-host; a firewall must keep strangers away from it"
    )
    log_dir: Path | None = option(None, "folder for rank-N.log; default: the agent's own stderr")
    lifeline_fd: int = option(-1, "inherited pipe; its end of file stops the agent and its ranks")
    lease_ttl_s: float = option(5.0, "etcd lease of the agent and of every rank")
    stop_grace_s: float = option(5.0, "how long a rank may take to exit before it is killed")
    leave_grace_s: float = option(
        30.0, "after SIGTERM, how long its ranks may take to be drained before they end; 0: none"
    )
    dying_poll_ms: float = option(
        10.0, "how often to check whether a rank has begun to exit; 0: see only exits"
    )
    host_experts_gb: float = option(
        -1.0,
        "cuda: GB of host memory for a cache of experts that the ranks share; -1: a quarter of "
        "the free memory, 0: no cache",
    )
    pin_cpus: bool = option(True, "run each rank only on its own share of the CPUs")
    fork_ranks: bool = option(
        True, "start ranks as copies of one prepared process, which is faster than a new one"
    )
    metrics_host: str = option(
        "127.0.0.1", "address of /metrics, of this agent and its ranks, and of /health"
    )
    metrics_port: int = option(
        -1, "port of /metrics and /health; 0 takes a free one, -1 serves none"
    )
    log_level: str = option("info", "debug, info, warning or error")
    log_json: bool = option(False, "log one JSON object per line instead of text")

    @property
    def node_name(self) -> str:
        return self.node or socket.gethostname()

    @property
    def rank_store(self) -> EtcdOptions:
        """As whom the ranks reach etcd."""
        if self.rank_etcd_cert is None and self.rank_etcd_key is None:
            return self.store
        return replace(self.store, etcd_cert=self.rank_etcd_cert, etcd_key=self.rank_etcd_key)

    def check(self) -> None:
        """Raises ConfigError if a value is impossible."""
        self.store.check()
        self.rank_store.check()
        parse_ranks(self.ranks)
        if self.device not in _DEVICES:
            raise ConfigError(f"--device {self.device!r}: pass {', '.join(_DEVICES)}")
        if self.transfer_protocol not in _PROTOCOLS:
            raise ConfigError(
                f"--transfer-protocol {self.transfer_protocol!r}: pass {' or '.join(_PROTOCOLS)}"
            )
        if self.lease_ttl_s < 1 or min(self.stop_grace_s, self.leave_grace_s) < 0:
            raise ConfigError(
                "--lease-ttl-s must be at least 1, --stop-grace-s and --leave-grace-s at least 0"
            )
        if self.ranks_max < 0:
            raise ConfigError("--ranks-max must not be negative")
        if not 0 <= self.dying_poll_ms <= _DYING_POLL_MAX_MS:
            raise ConfigError(f"--dying-poll-ms must be from 0 to {_DYING_POLL_MAX_MS:.0f}")
        if not 0 <= self.control_port <= _PORT_MAX - len(parse_ranks(self.ranks)):
            raise ConfigError(f"--control-port {self.control_port}: not all ranks get a port")
        if not -1 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port {self.metrics_port}: pass a port, or -1 for none")
        if "/" in self.node_name:
            raise ConfigError(f"--node {self.node_name!r} must not contain a slash")
