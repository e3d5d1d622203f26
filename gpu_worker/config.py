"""The configuration of one rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from gpu_worker.exchange.replica_policy import ReplicaPolicy
from shared.config import Timings, option
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions
from shared.grammars.messages import (
    COMPILE_S_DEFAULT,
    GRAMMAR_MEMORY_MB_MIN,
    MEMORY_MB_DEFAULT,
)
from shared.secret import require_secret
from shared.types import DeviceKind


class ExchangeKind(Enum):
    """TRANSFER: one-sided writes of Mooncake's TransferEngine, between CPU ranks. EP: Mooncake's
    elastic EP buffer, between CUDA ranks; EP_FP8: the same with fp8 dispatch. NONE: an instance of
    one CUDA rank."""

    TRANSFER = "transfer"
    EP = "ep"
    EP_FP8 = "ep-fp8"
    NONE = "none"


ORPHAN_S_MAX = 600.0
_STEP_SEQUENCES_ENOUGH = 192
"""So many sequences may be in a step even if fewer decode at once, for those in mid-stream."""


class DispatchForm(Enum):
    """The number format in which tokens are sent to the experts of CUDA ranks."""

    BF16 = "bf16"
    FP8 = "fp8"


class KvCacheDtype(Enum):
    """The number format of cached keys and values, or latents."""

    AUTO = "auto"  # that of the computation
    FP8 = "fp8"  # e4m3, with a scale of 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """Filled from [rank] of the TOML file, STARFISH_RANK_* and flags. The node agent gives the
    identity (rank, incarnation, lease). A rank that is started by hand makes its own incarnation
    and lease."""

    rank: int = option(0, "stable number of this data-parallel rank")
    incarnation: int = option(0, "incarnation of this rank; 0 takes the next number from etcd")
    lease_id: int = option(0, "etcd lease to register under and keep alive; 0 grants one")
    node: str = option("localhost", "name of this host, the unit of correlated failure")
    store: EtcdOptions = field(default_factory=EtcdOptions)
    instance: str = option("default", "name of the Starfish instance, a prefix in etcd")
    secret_file: Path | None = option(
        None,
        "file with the secret that all processes of the instance share, closed to other users; "
        "without it, whoever reaches a rank's control port is let in",
    )
    model: Path | None = option(None, "checkpoint folder; default: the one in the instance's spec")
    device: DeviceKind = option(
        DeviceKind.AUTO, "cpu, cuda, or auto: cuda if there is a card and the model runs on it"
    )
    cuda_device: int = option(-1, "number of the card; -1: ranks take the host's cards in turn")
    control_host: str = option("127.0.0.1", "address of the control port (sessions, probes, links)")
    control_port: int = option(0, "port of the control listener; 0 takes a free one")
    data_host: str = option("127.0.0.1", "address of the ranks' data network; Mooncake binds to it")
    public_data_host: bool = option(
        False, "accept a public address as --data-host; a firewall must keep strangers away from it"
    )
    transfer_protocol: str = option("tcp", "Mooncake transport between ranks: tcp or rdma")
    memory_links: bool = option(
        True,
        "exchange with CPU ranks of the same host, user and container through memory that both "
        "map; without it, over Mooncake as with other hosts",
    )
    mooncake_ib_device: str = option("", "RDMA devices for Mooncake, comma-separated; rdma only")
    graph_timeout_ms: int = option(
        5000, "cuda: how long a kernel waits for a peer that no verdict has declared dead"
    )
    host_experts_gb: float = option(
        -1.0,
        "cuda: most GB that this rank pins of its host's expert cache; -1: all that the node agent "
        "provides (without an agent, a quarter of the free memory), 0: none",
    )
    host_experts_fd: int = option(
        -1, "inherited memory of the expert cache, which the ranks of a host share"
    )
    ep_dispatch: DispatchForm = option(
        DispatchForm.BF16,
        "cuda: number format of tokens sent to experts, bf16 or fp8, the same on all ranks; fp8 "
        "takes half the bytes and rounds: its answers differ from bf16's, but no death alters them",
    )
    replicas: ReplicaPolicy = option(
        ReplicaPolicy.GATHER,
        "gather: one replica of an expert computes for all ranks; spread: all replicas do",
    )
    kv_tokens: int = option(16384, "capacity of the KV cache of this rank, in tokens")
    kv_block_tokens: int = option(16, "tokens in a KV block")
    kv_cache_dtype: KvCacheDtype = option(
        KvCacheDtype.AUTO,
        "cuda: number format of the KV cache, the same on all ranks; auto: bf16. fp8 (e4m3) takes "
        "half the memory and rounds: its answers differ from bf16's, but no death alters them",
    )
    prefix_cache: bool = option(
        True, "begin a prompt with the KV blocks that earlier ones have computed for it"
    )
    kv_copies: bool = option(
        True,
        "keep replicas of running sessions' KV blocks on other ranks, so that after a death they "
        "go on without computing their tokens again; needs the prefix cache",
    )
    kv_copies_gb: float = option(
        -1.0,
        "GB of host memory for replicas of peers' KV blocks; -1: as much as the own KV cache, "
        "but at most 4",
    )
    step_tokens_max: int = option(
        0,
        "most tokens that this rank runs in one step; 0: 4,096 on a card that is the only rank, "
        "512 or 256 on cards with room for the exchange's buffers, else 192",
    )
    prefill_chunk_tokens: int = option(
        0,
        "most prompt tokens of one sequence in one step; 0: as many as a step has on cards whose "
        "steps are larger than 192, else 128",
    )
    mixed_prefill_tokens: int = option(
        0,
        "most prompt tokens in a step in which others decode, fewer the longer the prompt already "
        "is; 0: 512 on a card that is the only rank, 128 with peers if steps are larger than 192, "
        "else no limit of its own",
    )
    tenant_step_tokens: int = option(
        0,
        "most tokens of one API key in a step while other keys have requests, for its weight, or "
        "as many as the other that decodes least: so one client's requests lengthen the steps of "
        "others by so much; 0: 4 on CPUs, no limit on cards; -1: no limit",
    )
    tenant_host_rows: int = option(
        0,
        "most sequences of one API key in a step while other keys have requests, for its weight, "
        "whose tokens the host draws (min_p, penalties, a bias, log-probabilities, guided "
        "answers), and no more than a quarter of a step by what they have cost, but one; "
        "0: 4 on cards, 64 on CPUs; -1: no limit",
    )
    running_max: int = option(
        64, "most sequences that decode at once; sessions moved from a dead rank may exceed it"
    )
    waiting_max: int = option(
        256, "most sequences that wait; more are refused, the gateway retries"
    )
    orphan_s: float = option(
        10.0,
        "how many seconds sessions go on after their gateway is gone, so that clients can resume "
        "their streams at another gateway; 0: they end at once",
    )
    orphans_max: int = option(
        256, "most sessions that go on without a gateway; beyond it the oldest end"
    )
    grammar_compile_s: float = option(
        COMPILE_S_DEFAULT,
        "CPU seconds that the grammar of a guided answer may take to compile; its session fails "
        "beyond it",
    )
    grammar_memory_mb: int = option(
        MEMORY_MB_DEFAULT, "memory of the process in which this rank follows grammars"
    )
    leave_grace_s: float = option(
        30.0, "after SIGTERM, how long this rank may take to be drained before it ends; 0: none"
    )
    static: bool = option(False, "no failure detection: the baseline for measuring overhead")
    lifeline_fd: int = option(-1, "inherited pipe whose end of file means: stop")
    otlp_endpoint: str = option(
        "",
        "collector of OpenTelemetry traces over HTTP, such as http://collector:4318; needs the "
        "packages of starfish-moe[otel]. Default: no traces",
    )
    log_level: str = option("info", "debug, info, warning or error")
    log_json: bool = option(False, "one JSON object a line in place of text")
    timings: Timings = field(default_factory=Timings)

    def check(self) -> None:
        """Raises ConfigError if values contradict each other."""
        self.store.check()
        self.timings.check()
        require_secret(self.control_host, self.secret_file)
        if self.transfer_protocol not in ("tcp", "rdma"):
            raise ConfigError(f"--transfer-protocol {self.transfer_protocol!r}: say tcp or rdma")
        window_ms = self.timings.longest_silence_ms
        if self.graph_timeout_ms <= window_ms:
            raise ConfigError(
                f"--graph-timeout-ms {self.graph_timeout_ms} must be above the suspicion window "
                f"({window_ms} ms): it is a backstop, verdicts end waits"
            )
        if self.kv_block_tokens < 1 or self.kv_tokens < self.kv_block_tokens:
            raise ConfigError("--kv-tokens must hold at least one block of --kv-block-tokens")
        if self.grammar_compile_s <= 0 or self.grammar_memory_mb < GRAMMAR_MEMORY_MB_MIN:
            raise ConfigError(
                "--grammar-compile-s must be above 0, and --grammar-memory-mb at least "
                f"{GRAMMAR_MEMORY_MB_MIN}"
            )
        if self.kv_copies_gb < 0 and self.kv_copies_gb != -1:
            raise ConfigError("--kv-copies-gb must be 0 or more, or -1 for a default")
        if self.leave_grace_s < 0:
            raise ConfigError("--leave-grace-s must not be negative")
        if not 0 <= self.orphan_s <= ORPHAN_S_MAX or self.orphans_max < 0:
            raise ConfigError(
                f"--orphan-s must lie between 0 and {ORPHAN_S_MAX:g}, and --orphans-max must be at "
                "least 0"
            )
        self._check_steps()

    @property
    def step_sequences_max(self) -> int:
        """Most sequences, and most wanted rows of logits, in one step."""
        return min(self.step_tokens_max, max(self.running_max, _STEP_SEQUENCES_ENOUGH))

    def _check_steps(self) -> None:
        """A size of 0 is not chosen yet: see `step_sizes`. Raises ConfigError."""
        if min(self.step_tokens_max, self.prefill_chunk_tokens, self.mixed_prefill_tokens) < 0:
            raise ConfigError(
                "--step-tokens-max, --prefill-chunk-tokens and --mixed-prefill-tokens must be at "
                "least 1, or 0 for the device's default"
            )
        if self.step_tokens_max and self.prefill_chunk_tokens > self.step_tokens_max:
            raise ConfigError(
                f"--prefill-chunk-tokens {self.prefill_chunk_tokens} must be at most "
                f"--step-tokens-max {self.step_tokens_max}"
            )
        if self.running_max < 1 or (
            self.step_tokens_max and self.running_max > self.step_tokens_max
        ):
            raise ConfigError("--running-max must lie between 1 and --step-tokens-max")
