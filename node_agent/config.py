"""The configuration of a node agent."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from node_agent.rank_list import parse_ranks
from shared.config import option
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions

_DYING_POLL_MAX_MS = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Filled from [agent] of the TOML file, STARFISH_AGENT_* and flags. The arguments after `--` go
    to every rank unchanged."""

    node: str = option(
        "", "name of this host, whose ranks may fail together; default: its host name"
    )
    ranks: str = option("0-3", "the ranks of this host, such as 0-3 or 0,2")
    store: EtcdOptions = field(default_factory=EtcdOptions)
    instance: str = option("default", "name of the Starfish instance, a prefix in etcd")
    secret_file: Path | None = option(
        None,
        "file with the secret that all processes of the instance share, closed to other users; "
        "without it, whoever reaches a rank's control port is let in",
    )
    model: Path | None = option(None, "checkpoint folder, for the ranks")
    control_host: str = option("127.0.0.1", "address of the ranks' control ports")
    data_host: str = option("127.0.0.1", "address of the ranks' data network")
    public_data_host: bool = option(
        False, "accept a public address as --data-host; a firewall must keep strangers away from it"
    )
    log_dir: Path | None = option(None, "folder for rank-N.log; default: the agent's own stderr")
    lifeline_fd: int = option(-1, "inherited pipe; its end of file stops the agent and its ranks")
    lease_ttl_s: float = option(5.0, "etcd lease of the agent and of every rank")
    stop_grace_s: float = option(5.0, "how long a rank may take to exit before it is killed")
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
    metrics_host: str = option("127.0.0.1", "address of /metrics, of this agent and its ranks")
    metrics_port: int = option(-1, "port of /metrics; 0 takes a free one, -1 serves none")
    log_level: str = option("info", "debug, info, warning or error")
    log_json: bool = option(False, "log one JSON object per line instead of text")

    @property
    def node_name(self) -> str:
        return self.node or socket.gethostname()

    def check(self) -> None:
        """Raises ConfigError if a value is impossible."""
        self.store.check()
        parse_ranks(self.ranks)
        if self.lease_ttl_s < 1 or self.stop_grace_s < 0:
            raise ConfigError("--lease-ttl-s must be at least 1, --stop-grace-s at least 0")
        if not 0 <= self.dying_poll_ms <= _DYING_POLL_MAX_MS:
            raise ConfigError(f"--dying-poll-ms must be from 0 to {_DYING_POLL_MAX_MS:.0f}")
        if not -1 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port {self.metrics_port}: pass a port, or -1 for none")
        if "/" in self.node_name:
            raise ConfigError(f"--node {self.node_name!r} must not contain a slash")
