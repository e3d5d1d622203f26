"""The configuration of a control plane, and the instance's spec that follows from it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from control_plane.silence import SilenceTimings
from shared.config import Timings, option
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions
from shared.model_spec import ModelSpec
from shared.records import InstanceSpec
from shared.weights_identity import weights_identity

LEARNT_WINDOW_MIN_MS = 120.0
"""The shortest silence that ends a member if the window is learnt: `SilenceTimings.stopped_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPlaneConfig:
    """Filled from [control_plane] of the TOML file, STARFISH_CONTROL_PLANE_* and flags."""

    model: Path | None = option(None, "checkpoint folder (Hugging Face); required")
    model_name: str = option("", "the name that clients ask for; default: the folder's name")
    store: EtcdOptions = field(default_factory=EtcdOptions)
    instance: str = option("default", "name of the Starfish instance, a prefix in etcd")
    secret_file: Path | None = option(
        None,
        "file with the secret that all processes of the instance share, closed to other users; "
        "without it, whoever reaches a rank's control port is let in",
    )
    ranks: int = option(4, "how many ranks the instance has")
    ranks_max: int = option(
        0,
        "cuda: how many ranks it may become; exchange buffers are made for so many at the start; "
        "0: as many as it has",
    )
    redundant_experts: int = option(
        -1, "replicas of experts beyond one each, per layer; -1: a second one of every expert"
    )
    slots_per_rank: int = option(
        0, "slots for experts on a rank, per layer; 0: enough for half of the ranks to hold all"
    )
    context_tokens_max: int = option(
        0, "longest prompt and answer together, in tokens; 0: what the model was made for"
    )
    speculative_tokens: int = option(
        0,
        "tokens that ranks draft for a sequence and verify in its next step, by the checkpoint's "
        "layer of multi-token prediction; answers stay the same; 0 or 1, on CPUs alone",
    )
    name: str = option("", "name of this control plane in etcd; default: host and pid")
    leader_ttl_s: float = option(
        2.0, "lease of the leader key; a killed leader is replaced after it"
    )
    formation_grace_s: float = option(
        1.0,
        "after an outage, ranks that can hold all experts wait this long for another one, then "
        "serve without it",
    )
    first_formation_grace_s: float = option(5.0, "the same, for the first map of an instance")
    formation_window_s: float = option(
        30.0, "ranks that keep coming delay a map for this long at most"
    )
    heal_after_s: float = option(5.0, "time without a change before experts are moved")
    heal_budget_mb: int = option(256, "weights that one step of healing may move")
    drain_stragglers_after_s: float = option(
        0.0,
        "drain a rank for which the others have waited for so long, two fifths of each step and 20 "
        "ms or more; it stays out until `starfish undrain`. 0: never",
    )
    rebalance: bool = option(
        True,
        "move experts when tokens prefer other ones than before; only where replicas share their "
        "tokens (--replicas spread of the ranks)",
    )
    rebalance_threshold: float = option(
        0.1, "a rebalance begins if the layers' busiest ranks are relieved by more than this part"
    )
    load_time_constant_s: float = option(
        60.0, "tokens count less the longer ago they were: 37 % after this time"
    )
    load_interval_s: float = option(
        1.0,
        "how often ranks are asked what their tokens chose; longer with more than 100 ranks, "
        "0: never",
    )
    probe_interval_ms: float = option(500.0, "how often every rank is probed")
    urgent_probe_interval_ms: float = option(20.0, "the same, while any rank is suspected")
    host: str = option("127.0.0.1", "address of /health and /metrics")
    port: int = option(-1, "port of /health and /metrics; 0 takes a free one, -1 serves neither")
    admin_host: str = option("127.0.0.1", "address of the admin API")
    admin_port: int = option(
        -1, "port of the admin API; 0 takes a free one, -1: there is none. It needs a token"
    )
    admin_token_file: Path | None = option(
        None,
        "file with the token that the admin API asks for, the same for all control planes of the "
        "instance, closed to other users",
    )
    admin_address: str = option(
        "",
        "host name or address at which other hosts reach the admin API; default: --admin-host, or "
        "this host's name if that stands for all addresses",
    )
    admin_tls_cert: Path | None = option(
        None, "PEM file with the certificate chain of the admin API: it is served over TLS then"
    )
    admin_tls_key: Path | None = option(None, "PEM file with the key of --admin-tls-cert")
    admin_ca: Path | None = option(
        None,
        "PEM file with the authority of the other control planes' admin API, to which requests "
        "are passed on; default: those of the system",
    )
    admin_listen_fd: int = option(
        -1, "inherited listening socket on which the admin API is served as well"
    )
    allow_kill: bool = option(
        False,
        "whoever has the admin token may kill ranks that run on this host: the page has a button "
        "for it, for demonstrations",
    )
    lifeline_fd: int = option(-1, "inherited pipe whose end of file means: stop")
    log_level: str = option("info", "debug, info, warning or error")
    log_json: bool = option(False, "one JSON object a line in place of text")
    timings: Timings = field(default_factory=Timings)

    @property
    def silence(self) -> SilenceTimings:
        return SilenceTimings(override_s=self.timings.suspicion_window_ms / 1000)

    def check(self) -> None:
        """Raises ConfigError if a value is impossible."""
        self.store.check()
        self.timings.check()
        _ = self.model_folder
        if self.ranks < 1:
            raise ConfigError(f"--ranks {self.ranks}: an instance has at least one rank")
        if self.ranks_max and self.ranks_max < self.ranks:
            raise ConfigError(f"--ranks-max {self.ranks_max} must not be below --ranks")
        if self.redundant_experts < -1 or self.slots_per_rank < 0:
            raise ConfigError("--redundant-experts and --slots-per-rank must not be negative")
        if self.context_tokens_max < 0:
            raise ConfigError("--context-tokens-max must not be negative")
        if self.speculative_tokens not in (0, 1):
            raise ConfigError(
                f"--speculative-tokens {self.speculative_tokens}: pass 1, or 0 for none"
            )
        if self.leader_ttl_s < 1:
            raise ConfigError("--leader-ttl-s must be at least 1: etcd grants no shorter lease")
        if self.admin_port >= 0 and self.admin_token_file is None:
            raise ConfigError(
                "--admin-port: the admin API needs --admin-token-file; make the file with "
                "`openssl rand -hex 32` and chmod 600"
            )
        if (self.admin_tls_cert is None) != (self.admin_tls_key is None):
            raise ConfigError("--admin-tls-cert and --admin-tls-key go together: pass both")
        if self.admin_tls_cert is not None and self.admin_port < 0:
            raise ConfigError("--admin-tls-cert: there is no admin API without --admin-port")
        if not (
            0 <= self.formation_grace_s <= self.formation_window_s
            and 0 <= self.first_formation_grace_s <= self.formation_window_s
        ):
            raise ConfigError(
                "--formation-grace-s and --first-formation-grace-s must lie between 0 and "
                f"--formation-window-s ({self.formation_window_s} s)"
            )
        if self.rebalance_threshold <= 0 or self.load_time_constant_s <= 0:
            raise ConfigError(
                "--rebalance-threshold and --load-time-constant-s must be positive: every noise "
                "would move experts"
            )
        if self.drain_stragglers_after_s < 0:
            raise ConfigError("--drain-stragglers-after-s must not be negative; 0: never")
        if self.load_interval_s < 0:
            raise ConfigError("--load-interval-s must not be negative")
        window_ms = self.timings.suspicion_window_ms or LEARNT_WINDOW_MIN_MS
        if not 0 < self.urgent_probe_interval_ms < window_ms / 2:
            raise ConfigError(
                "--urgent-probe-interval-ms must be under half of the suspicion window "
                f"({window_ms} ms)"
            )
        if self.probe_interval_ms < self.urgent_probe_interval_ms:
            raise ConfigError("--probe-interval-ms must not be under the urgent interval")

    @property
    def model_folder(self) -> Path:
        """Raises ConfigError if no model is configured."""
        if self.model is None:
            raise ConfigError("--model is missing; pass the folder of a Hugging Face checkpoint")
        return self.model

    def admin_url(self, port: int) -> str:
        """Where other control planes, and commands, reach this one's admin API."""
        host = self.admin_address or self.admin_host
        if host in ("0.0.0.0", "::", ""):
            host = socket.gethostname()
        scheme = "http" if self.admin_tls_cert is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def unique_name(self, pid: int) -> str:
        return self.name or f"{socket.gethostname()}-{pid}"


def instance_spec(config: ControlPlaneConfig, model: ModelSpec) -> InstanceSpec:
    """`model` is as the ranks serve it, with the layers that draft. Raises ConfigError if the ranks
    cannot hold every expert, and CheckpointError."""
    folder = config.model_folder.resolve()
    experts, ranks = model.num_experts, config.ranks
    redundant = config.redundant_experts
    if redundant < 0:
        redundant = experts if ranks > 1 else 0
    if not model.moe_layers:
        redundant = ranks - 1  # a dense model's one expert needs no load, so every rank has it
    slots = config.slots_per_rank or max(
        _ceil(experts + redundant, ranks), _ceil(experts, _ceil(ranks, 2))
    )
    if slots * ranks < experts:
        raise ConfigError(
            f"{ranks} ranks with {slots} slots each hold {slots * ranks} experts of a layer, but "
            f"the model has {experts}; pass --slots-per-rank {_ceil(experts, ranks)} or more"
        )
    if slots * ranks < experts + redundant:
        raise ConfigError(
            f"{redundant} redundant experts do not fit into {ranks} ranks with {slots} slots each; "
            f"pass --slots-per-rank {_ceil(experts + redundant, ranks)} or more, or fewer redundant"
        )
    return InstanceSpec(
        model_name=config.model_name or folder.name,
        model_path=str(folder),
        num_moe_layers=model.num_moe_layers,
        num_experts=experts,
        num_ranks=ranks,
        slots_per_rank=slots,
        redundant_experts=redundant,
        context_tokens_max=_context(config, model),
        vocab_size=model.vocab_size,
        weights=weights_identity(folder),
        ranks_max=config.ranks_max,
        speculative_tokens=config.speculative_tokens,
    )


def _context(config: ControlPlaneConfig, model: ModelSpec) -> int:
    if config.context_tokens_max > model.context_tokens_max:
        raise ConfigError(
            f"--context-tokens-max {config.context_tokens_max}: the model was made for "
            f"{model.context_tokens_max}"
        )
    return config.context_tokens_max or model.context_tokens_max


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
