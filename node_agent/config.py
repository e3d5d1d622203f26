"""The configuration of a node agent."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from node_agent.rank_list import parse_ranks
from shared.config import option
from shared.errors import ConfigError

_DYING_POLL_MAX_MS = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Filled from [agent] of the TOML file, STARFISH_AGENT_* and flags. What stands after `--` on
    the command line goes to every rank as it is."""

    node: str = option("", "name of this host, the unit of correlated failure; default: its name")
    ranks: str = option("0-3", "the ranks of this host, such as 0-3 or 0,2")
    etcd: str = option("127.0.0.1:2379", "etcd endpoints, comma-separated host:port")
    instance: str = option("default", "name of the Starfish instance, a prefix in etcd")
    model: Path | None = option(None, "checkpoint folder, for the ranks")
    control_host: str = option("127.0.0.1", "address of the ranks' control ports")
    data_host: str = option("127.0.0.1", "address of the ranks' data network")
    log_dir: Path | None = option(None, "folder for rank-N.log; default: the agent's own stderr")
    lifeline_fd: int = option(-1, "inherited pipe whose end of file means: stop, ranks and all")
    lease_ttl_s: float = option(5.0, "etcd lease of the agent and of every rank")
    stop_grace_s: float = option(5.0, "how long a rank may take to exit before it is killed")
    dying_poll_ms: float = option(
        10.0, "how often ranks are looked at for having begun to die; 0: their end alone is seen"
    )
    host_experts_gb: float = option(
        -1.0,
        "cuda: GB of this host's memory for copies of experts, which its ranks share; -1: a "
        "quarter of what is free, 0: none",
    )
    pin_cpus: bool = option(True, "give every rank its share of the CPUs, and no others")
    log_level: str = option("info", "debug, info, warning or error")
    log_json: bool = option(False, "one JSON object a line in place of text")

    @property
    def node_name(self) -> str:
        return self.node or socket.gethostname()

    def check(self) -> None:
        """Raises ConfigError where a value is impossible."""
        parse_ranks(self.ranks)
        if self.lease_ttl_s < 1 or self.stop_grace_s < 0:
            raise ConfigError("--lease-ttl-s must be at least 1, --stop-grace-s at least 0")
        if not 0 <= self.dying_poll_ms <= _DYING_POLL_MAX_MS:
            raise ConfigError(f"--dying-poll-ms must be 0 or at most {_DYING_POLL_MAX_MS:.0f}")
        if "/" in self.node_name:
            raise ConfigError(f"--node {self.node_name!r} must not contain a slash")
