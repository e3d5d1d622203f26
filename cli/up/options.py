"""The options of `starfish up`: each flag is declared here, and checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cli.run_dir import ADMIN_TOKEN_FILE, SECRET_FILE, default_run_dir
from cli.target_flags import (
    EtcdCaFlag,
    EtcdCertFlag,
    EtcdKeyFlag,
    EtcdPasswordFileFlag,
    EtcdServerNameFlag,
    EtcdUserFlag,
    RunDirFlag,
    etcd_options_of,
)
from cli.up.device import DEVICES
from cli.up.model import default_model_dir
from cli.up.port_holder import holder_of
from shared.errors import ConfigError
from shared.etcd_credentials import read_credentials
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import EtcdService
from shared.keys import Keys
from shared.listener import listen_on
from shared.secret import is_loopback, read_private_file, read_secret
from shared.types import ROUTING_POLICIES, RoutingPolicyName

GATEWAYS_MAX = 64
API_KEYS_VARIABLE = "STARFISH_API_KEYS"
_RDMA_NOTE = "RDMA devices need an RDMA network; pass --transfer-protocol rdma as well"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """One field per flag. Where -1 or 0 stands for a default, its flag's help says which."""

    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face checkpoint (default: the small model that ships)."),
    ] = None
    seeded: Annotated[
        bool,
        typer.Option(
            "--seeded", help="Serve random weights of the reference size, for benchmarks."
        ),
    ] = False
    chosen_model_dir: Annotated[
        Path | None,
        typer.Option("--model-dir", help="Folder in which --seeded keeps its checkpoint."),
    ] = None
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 4
    ranks_max: Annotated[
        int,
        typer.Option(
            help="On GPUs: to how many ranks `starfish scale` may grow it; exchange buffers are "
            "made for so many at the start. 0: as many as it has."
        ),
    ] = 0
    redundant_experts: Annotated[
        int,
        typer.Option(
            "--redundant-experts",
            "--ep-num-redundant-experts",
            help="Extra replicas of experts per layer, beyond one of each; -1: one extra of each.",
        ),
    ] = -1
    slots_per_rank: Annotated[
        int, typer.Option(help="Expert slots on each rank; 0: as many as are useful.")
    ] = 0
    speculative_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens that ranks draft for a sequence and verify in its next step, by the "
            "checkpoint's layer of multi-token prediction; answers stay the same. 0 or 1; on CPUs "
            "alone."
        ),
    ] = 0
    host: Annotated[str, typer.Option(help="Address of the HTTP API.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port of the HTTP API.")] = 8000
    etcd: Annotated[
        str | None,
        typer.Option(help="Use the etcd at HOST:PORT[,…] instead of starting an embedded one."),
    ] = None
    etcd_ca: EtcdCaFlag = None
    etcd_cert: EtcdCertFlag = None
    etcd_key: EtcdKeyFlag = None
    etcd_server_name: EtcdServerNameFlag = ""
    etcd_user: EtcdUserFlag = ""
    etcd_password_file: EtcdPasswordFileFlag = None
    etcd_credentials: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `starfish etcd-setup` made: with it each service reaches etcd as a "
            "user of its own, instead of all as the one of the flags above."
        ),
    ] = None
    gateways: Annotated[
        int,
        typer.Option(
            help="Gateway processes, which share the port: one takes a core at tens of thousands "
            "of tokens/s. Each counts limits (also those of API keys) and remembers stored "
            "responses for itself."
        ),
    ] = 1
    routing: Annotated[
        str,
        typer.Option(
            help="How gateways choose a request's rank: prefix-affinity, least-tokens, "
            "power-of-two or round-robin."
        ),
    ] = RoutingPolicyName.PREFIX_AFFINITY.value
    control_planes: Annotated[int, typer.Option(help="2: one stands by; or 1.")] = 2
    metrics_port: Annotated[
        int,
        typer.Option(
            help="First of the ports at which the control planes, one each, and then the node "
            "agent serve /metrics, on this host alone; 0: only gateways do."
        ),
    ] = 0
    instance: Annotated[str, typer.Option(help="Name of the instance.")] = "default"
    chosen_run_dir: RunDirFlag = None
    chosen_secret_file: Annotated[
        Path | None,
        typer.Option(
            "--secret-file",
            help="File with the secret that the instance's processes share (default: a new one, "
            "in the run folder).",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="TOML file with the API keys of clients and their limits (`starfish keys new` "
            "makes one); without it nobody needs a key.",
        ),
    ] = None
    admin_host: Annotated[
        str, typer.Option(help="Address of the admin API, which changes the instance.")
    ] = "127.0.0.1"
    admin_port: Annotated[int, typer.Option(help="Port of the admin API; 0 takes a free one.")] = 0
    chosen_admin_token_file: Annotated[
        Path | None,
        typer.Option(
            "--admin-token-file",
            help="File with the token that the admin API asks for (default: a new one, in the run "
            "folder).",
        ),
    ] = None
    admin_tls_cert: Annotated[
        Path | None, typer.Option(help="PEM certificate chain: the admin API has TLS then.")
    ] = None
    admin_tls_key: Annotated[Path | None, typer.Option(help="PEM file with its key.")] = None
    admin_ca: Annotated[
        Path | None, typer.Option(help="PEM file with its authority (default: itself).")
    ] = None
    allow_kill: Annotated[
        bool,
        typer.Option(
            "--allow-kill",
            help="The page at the admin API's address has a button that kills a rank, for "
            "demonstrations.",
        ),
    ] = False
    demo: Annotated[
        bool,
        typer.Option(
            help="Stream one completion after the start; if that needs an API key, only with one "
            "in STARFISH_API_KEY."
        ),
    ] = True
    static: Annotated[
        bool,
        typer.Option("--static", help="No failure detection: a baseline for measurements."),
    ] = False
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda, or auto: CUDA if there is a GPU and the model runs on it."),
    ] = "auto"
    cuda_mps: Annotated[
        bool | None,
        typer.Option(
            "--cuda-mps/--no-cuda-mps",
            help="Share GPUs through a CUDA MPS daemon (default: if there are more ranks than "
            "GPUs).",
        ),
    ] = None
    transfer_protocol: Annotated[
        str, typer.Option(help="Mooncake transport between ranks: tcp or rdma.")
    ] = "tcp"
    ib_device: Annotated[
        str,
        typer.Option("--mooncake-ib-device", help="RDMA devices for Mooncake, comma-separated."),
    ] = ""
    elastic_ep_backend: Annotated[
        str | None, typer.Option(help="For SGLang's command lines; only mooncake is accepted.")
    ] = None
    moe_a2a_backend: Annotated[
        str | None, typer.Option(help="For SGLang's command lines; only mooncake is accepted.")
    ] = None
    kv_tokens: Annotated[
        int | None, typer.Option(help="Size of each rank's KV cache, in tokens.")
    ] = None
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="Number format of KV caches on GPUs: auto (bf16), or fp8, which takes half the "
            "memory and rounds."
        ),
    ] = "auto"
    host_experts_gb: Annotated[
        float,
        typer.Option(
            help="GB of host memory for a cache of experts that all ranks on GPUs share, so that "
            "orphans load fast; -1: a quarter of the free memory, 0: no cache."
        ),
    ] = -1.0
    context_tokens_max: Annotated[
        int,
        typer.Option(
            "--context-tokens-max",
            help="Longest prompt plus answer, in tokens; 0: the model's own limit.",
        ),
    ] = 0
    drain_s: Annotated[
        float,
        typer.Option(
            help="On the first Ctrl-C or SIGTERM, let streams go on for so long; new requests get "
            "503 meanwhile."
        ),
    ] = 30.0
    served_model_name: Annotated[
        str, typer.Option(help="Name that clients ask for; more, comma-separated, are aliases.")
    ] = ""
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file to use in place of the checkpoint's template.")
    ] = None
    trust_special_tokens: Annotated[
        bool, typer.Option(help="Special tokens that clients spell are special tokens, not text.")
    ] = True
    tool_call_parser: Annotated[
        str,
        typer.Option(help="Format of the model's tool calls (default: by the chat template)."),
    ] = ""
    reasoning_parser: Annotated[
        str,
        typer.Option(help="Format of the model's reasoning (default: by the chat template)."),
    ] = ""
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file with the certificate chain, for HTTPS.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with the key of it.")] = None
    cors_origins: Annotated[
        str, typer.Option(help="Origins whose pages may call the API, comma-separated; * for all.")
    ] = ""
    otlp_endpoint: Annotated[
        str,
        typer.Option(
            help="Collector of OpenTelemetry traces over HTTP, such as http://localhost:4318 "
            "(needs starfish-moe[otel]; default: no traces)."
        ),
    ] = ""
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Services log a JSON object per line.")
    ] = False
    log_mb_max: Annotated[
        float,
        typer.Option(
            help="Size in MB at which a log in the run folder begins anew; one older part is kept. "
            "0: never."
        ),
    ] = 64.0
    timeout_s: Annotated[
        float, typer.Option(help="Give up if the instance does not serve within this time.")
    ] = 300.0
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info"

    @property
    def model_dir(self) -> Path:
        return self.chosen_model_dir or default_model_dir()

    @property
    def run_dir(self) -> Path:
        return (self.chosen_run_dir or default_run_dir(self.instance)).absolute()

    @property
    def secret_file(self) -> Path:
        if self.chosen_secret_file is None:
            return self.run_dir / SECRET_FILE
        return self.chosen_secret_file.absolute()

    @property
    def admin_authority(self) -> Path | None:
        """Whose certificate the admin API has; None without TLS."""
        found = self.admin_ca or self.admin_tls_cert
        return None if found is None or self.admin_tls_cert is None else found.absolute()

    @property
    def admin_token_file(self) -> Path:
        if self.chosen_admin_token_file is None:
            return self.run_dir / ADMIN_TOKEN_FILE
        return self.chosen_admin_token_file.absolute()

    def stores(self, keys: Keys) -> Mapping[EtcdService, EtcdOptions]:
        """As whom each service reaches an etcd that runs already. Raises ConfigError."""
        assert self.etcd is not None, "there is no such etcd"
        base = etcd_options_of(self).absolute()
        folder = self.etcd_credentials
        if folder is None:
            return dict.fromkeys(EtcdService, base)
        return {
            service: read_credentials(folder.absolute(), base, keys, service)
            for service in EtcdService
        }

    @property
    def metrics_ports(self) -> tuple[int, ...]:
        """Of the control planes, then of the agent; empty: they serve none."""
        first = self.metrics_port
        return tuple(range(first, first + self.control_planes + 1)) if first else ()

    @property
    def needs_api_key(self) -> bool:
        return self.api_key_file is not None or bool(os.environ.get(API_KEYS_VARIABLE, "").strip())

    @property
    def is_open_to_all(self) -> bool:
        """Whether other hosts reach the HTTP API, and nobody needs a key."""
        return not self.needs_api_key and not is_loopback(self.host)

    def check(self) -> None:
        """Raises ConfigError if a value is impossible, two flags contradict each other, or the
        port is taken."""
        self.check_values()
        check_port(self.host, self.port)
        for port in self.metrics_ports:
            check_port("127.0.0.1", port, flag="--metrics-port")

    def check_values(self) -> None:
        """As `check`, without the port."""
        self._check_aliases()
        if self.ranks < 1:
            raise ConfigError(f"--ranks {self.ranks}: an instance needs at least one rank")
        if self.ranks_max and self.ranks_max < self.ranks:
            raise ConfigError(f"--ranks-max {self.ranks_max} must not be below --ranks")
        if not 1 <= self.gateways <= GATEWAYS_MAX:
            raise ConfigError(f"--gateways {self.gateways}: pass a number from 1 to {GATEWAYS_MAX}")
        if self.routing not in ROUTING_POLICIES:
            raise ConfigError(
                f"--routing {self.routing!r}: pass one of {', '.join(ROUTING_POLICIES)}"
            )
        if self.control_planes not in (1, 2):
            raise ConfigError(
                f"--control-planes {self.control_planes}: pass 1, or 2 to have one on standby"
            )
        if self.redundant_experts < -1 or self.slots_per_rank < 0:
            raise ConfigError("--redundant-experts and --slots-per-rank must not be negative")
        if self.speculative_tokens not in (0, 1):
            raise ConfigError(
                f"--speculative-tokens {self.speculative_tokens}: pass 1, or 0 for none"
            )
        if self.log_mb_max < 0:
            raise ConfigError(f"--log-mb-max {self.log_mb_max:g}: pass 0 or more")
        if self.context_tokens_max < 0:
            raise ConfigError("--context-tokens-max must not be negative")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise ConfigError(f"--chat-template {self.chat_template}: there is no such file")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together: pass both, or none")
        if not self.instance or "/" in self.instance or self.instance.startswith("."):
            raise ConfigError(
                f"--instance {self.instance!r}: pass a name without slashes and leading dots"
            )
        if self.kv_cache_dtype not in ("auto", "fp8"):
            raise ConfigError(f"--kv-cache-dtype {self.kv_cache_dtype!r}: pass auto or fp8")
        if self.device not in DEVICES:
            raise ConfigError(f"--device {self.device!r}: pass one of {', '.join(DEVICES)}")
        if self.ib_device and self.transfer_protocol != "rdma":
            raise ConfigError(f"--mooncake-ib-device {self.ib_device}: {_RDMA_NOTE}")
        if self.model is not None and not self.model.is_dir():
            raise ConfigError(
                f"{self.model} is not a folder; pass a Hugging Face checkpoint as --model"
            )
        if self.etcd is not None:
            for store in self.stores(Keys(self.instance)).values():
                store.check()
        elif self.etcd_ca or self.etcd_cert or self.etcd_user or self.etcd_credentials:
            raise ConfigError("without --etcd an etcd of our own is started: leave --etcd-… out")
        read_secret(self.chosen_secret_file)
        if self.api_key_file is not None:
            read_private_file(self.api_key_file, flag="--api-key-file", bytes_max=1)
        if self.chosen_admin_token_file is not None:
            read_private_file(self.chosen_admin_token_file, flag="--admin-token-file")
        if (self.admin_tls_cert is None) != (self.admin_tls_key is None):
            raise ConfigError("--admin-tls-cert and --admin-tls-key go together: pass both")
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port {self.port}: pass a port between 1 and 65535")
        if not 0 <= self.admin_port < 65536:
            raise ConfigError(f"--admin-port {self.admin_port}: pass a port below 65536, or 0")
        if not 0 <= self.metrics_port < 65536 - self.control_planes:
            raise ConfigError(f"--metrics-port {self.metrics_port}: pass a port, or 0 for none")

    def _check_aliases(self) -> None:
        """SGLang's flags, for which Starfish has only one value."""
        for flag, value in (
            ("--elastic-ep-backend", self.elastic_ep_backend),
            ("--moe-a2a-backend", self.moe_a2a_backend),
        ):
            if value not in (None, "mooncake"):
                raise ConfigError(
                    f"{flag} {value!r}: Starfish has only mooncake; leave the flag out"
                )


def check_port(host: str, port: int, *, flag: str = "--port") -> None:
    """Raises ConfigError if nobody could listen there."""
    try:
        listen_on(host, port).close()
    except ConfigError as error:
        holder = holder_of(port)
        if holder is None:
            raise
        raise ConfigError(
            f"cannot listen on {host}:{port}: another process does ({holder}); stop it, or pass "
            f"another {flag}"
        ) from error
