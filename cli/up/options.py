"""What `starfish up` was asked for, checked before anything starts."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from cli.up.device import DEVICES
from shared.errors import ConfigError

_RDMA_NOTE = "RDMA devices need a cluster network: pass --transfer-protocol rdma with them"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    model: Path | None
    seeded: bool  # random weights in place of a model
    model_dir: Path  # where the seeded model is kept
    ranks: int
    redundant_experts: int  # -1: the control plane's default
    slots_per_rank: int  # 0: the control plane's default
    host: str
    port: int
    etcd: str | None
    control_planes: int
    instance: str
    run_dir: Path
    demo: bool
    static: bool
    device: str
    cuda_mps: bool | None  # None: where there are more ranks than cards
    transfer_protocol: str
    ib_device: str
    kv_tokens: int | None
    host_experts_gb: float  # -1: a quarter of what is free
    context_tokens_max: int  # 0: what the model was made for
    timeout_s: float
    log_level: str

    def check(self) -> None:
        """Raises ConfigError where flags are impossible or contradict each other."""
        if self.ranks < 1:
            raise ConfigError(f"--ranks {self.ranks}: an instance has at least one rank")
        if self.control_planes not in (1, 2):
            raise ConfigError(f"--control-planes {self.control_planes}: say 1, or 2 for a standby")
        if self.redundant_experts < -1 or self.slots_per_rank < 0:
            raise ConfigError("--redundant-experts and --slots-per-rank must not be negative")
        if self.context_tokens_max < 0:
            raise ConfigError("--context-tokens-max must not be negative")
        if not self.instance or "/" in self.instance:
            raise ConfigError(f"--instance {self.instance!r}: a name without slashes is needed")
        if self.device not in DEVICES:
            raise ConfigError(f"--device {self.device!r}: say {', '.join(DEVICES)}")
        if self.ib_device and self.transfer_protocol != "rdma":
            raise ConfigError(f"--mooncake-ib-device {self.ib_device}: {_RDMA_NOTE}")
        if self.model is not None and not self.model.is_dir():
            raise ConfigError(
                f"{self.model} is not a folder; --model wants a Hugging Face checkpoint"
            )
        check_port(self.host, self.port)


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where the gateway could not listen there."""
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port}: a port lies between 1 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}); pass another --port or --host"
            ) from error


def check_aliases(elastic_ep_backend: str | None, moe_a2a_backend: str | None) -> None:
    """SGLang's flags that Starfish has only one answer to. Raises ConfigError for another."""
    for flag, value in (
        ("--elastic-ep-backend", elastic_ep_backend),
        ("--moe-a2a-backend", moe_a2a_backend),
    ):
        if value not in (None, "mooncake"):
            raise ConfigError(f"{flag} {value!r}: Starfish has only mooncake")
