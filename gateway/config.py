"""The configuration of one gateway."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gateway.parsers.formats import AUTO, check_parser_names
from shared.config import Timings, option
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions
from shared.grammars.messages import (
    COMPILE_S_DEFAULT,
    GRAMMAR_MEMORY_MB_MIN,
    MEMORY_MB_DEFAULT,
)
from shared.types import ROUTING_POLICIES, RoutingPolicyName


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Filled from [gateway] of the TOML file, STARFISH_GATEWAY_* and flags."""

    host: str = option("127.0.0.1", "address that clients connect to")
    port: int = option(8000, "port that clients connect to; 0 takes a free one")
    store: EtcdOptions = field(default_factory=EtcdOptions)
    instance: str = option("default", "name of the Starfish instance, a prefix in etcd")
    secret_file: Path | None = option(
        None,
        "file with the secret that all processes of the instance share, closed to other users; "
        "without it, whoever reaches a rank's control port is let in",
    )
    model: Path | None = option(
        None, "checkpoint folder, for its tokenizer; default: the one in the instance's spec"
    )
    chat_template: Path | None = option(
        None, "file with a Jinja chat template, used in place of the checkpoint's"
    )
    trust_special_tokens: bool = option(
        True,
        "special tokens that clients spell in texts and messages (<|im_end|>) are special tokens, "
        "as in transformers; --no-trust-special-tokens makes them ordinary text",
    )
    tool_call_parser: str = option(
        AUTO,
        "format of the model's tool calls, by vLLM's name (hermes, qwen3_coder, glm45, mistral, "
        "deepseek_v3, deepseek_v31, deepseek_v32, openai); auto: by the chat template; none: "
        "tools are refused",
    )
    reasoning_parser: str = option(
        AUTO,
        "format of the model's reasoning, by vLLM's name (qwen3, deepseek_r1, deepseek_v3, glm45, "
        "mistral, openai_gptoss); auto: by the chat template; none: it stays in the content",
    )
    served_model_name: str = option(
        "", "name that clients ask for; more, comma-separated, are aliases; default: the spec's"
    )
    routing: str = option(
        RoutingPolicyName.PREFIX_AFFINITY.value,
        "how a request's rank is chosen among those that are live and have room: prefix-affinity "
        "(the least work, less what the rank's prefix cache saves), least-tokens (the least work), "
        "power-of-two (the one of two random ranks with less work) or round-robin",
    )
    tokens_in_flight_max: int = option(
        8_000_000, "limit on prompt + max_tokens, summed over requests in flight; beyond it: 429"
    )
    sessions_max: int = option(2048, "limit on choices in flight; beyond it: 429")
    body_bytes_max: int = option(4 << 20, "limit on a request's body, in bytes; beyond it: 413")
    grammar_bytes_max: int = option(
        128 << 10,
        "limit on the text of a guided answer's schema, expression, choices or grammar, in bytes; "
        "beyond it: 400",
    )
    grammar_properties_max: int = option(
        2000, "limit on the properties in a JSON schema; beyond it: 400"
    )
    grammar_compile_s: float = option(
        COMPILE_S_DEFAULT, "CPU seconds that a grammar may take to compile; beyond it: 400"
    )
    grammar_memory_mb: int = option(
        MEMORY_MB_DEFAULT, "memory of the process in which grammars are checked; beyond it: 400"
    )
    structured_outputs_disable_any_whitespace: bool = option(
        False,
        "guided JSON has no white space between its tokens, unless a request has a "
        "whitespace_pattern; without this, a space or a new line with an indent",
    )
    logprobs_max: int = option(
        1_000_000,
        "limit on the log-probabilities of one request: tokens, of the prompt if it is scored and "
        "of a whole answer, times the likeliest wanted and one, times choices; beyond it: 400",
    )
    connections_max: int = option(
        4096,
        "limit on connections of clients; beyond it the one that has waited longest for its client "
        "is closed, or if all are served the new one, with 503",
    )
    connections_per_address_max: int = option(
        2048,
        "the same for those of one client address (a /64 of IPv6), with 429. Behind a proxy, all "
        "clients have the proxy's address",
    )
    header_timeout_s: float = option(
        20.0, "a connection is closed if the header of a request is not whole within this time"
    )
    idle_timeout_s: float = option(
        75.0, "a connection is closed if no request follows an answer within this time"
    )
    api_key_file: Path | None = option(
        None,
        "TOML file with the API keys of clients and their limits, closed to other users; read "
        "again when it changes. Without it, and without STARFISH_API_KEYS, nobody needs a key",
    )
    metrics_need_key: bool = option(
        False, "/metrics needs an API key that has reads_metrics = true in the file"
    )
    share_prefix_cache: bool = option(
        False,
        "clients with different API keys use each other's cached prompts: fewer tokens to compute, "
        "but cached_tokens and the time to the first token tell a client what others have sent",
    )
    event_ids: bool = option(
        True,
        "events of streams have ids, by which a client can resume a stream at any gateway; "
        "--no-event-ids is for clients that know no line of an event but data:",
    )
    access_log: bool = option(
        True, "log a line for each request; for /health and /metrics only if they fail"
    )
    no_rank_timeout_s: float = option(
        120.0,
        "a request fails if for this time no live rank accepts it, or its rank finishes no step; "
        "several times the control plane's --formation-window-s, so that streams outlive an outage",
    )
    drain_s: float = option(
        30.0,
        "how long streams may go on after SIGTERM; new requests get 503 meanwhile, and streams "
        "that are not done then end with an error event",
    )
    tls_cert: Path | None = option(
        None, "PEM file with the certificate chain for HTTPS; read again when it changes"
    )
    tls_key: Path | None = option(None, "PEM file with the key of --tls-cert, unencrypted")
    cors_origins: str = option(
        "",
        "origins whose pages may call this gateway from a browser, comma-separated, such as "
        "https://chat.example.com; * allows all",
    )
    reuse_port: bool = option(
        False,
        "share the port with other gateways of this user that say so as well; the kernel gives "
        "each new connection to one of them. Each gateway counts limits, also those of API keys, "
        "and remembers stored responses for itself",
    )
    own_port: int = option(
        -1,
        "port of this gateway alone, served besides a shared one: /metrics of a shared port is "
        "that of any gateway; 0 takes a free one (`starfish status` names it), -1: none",
    )
    listen_fd: int = option(
        -1,
        "inherited listening socket, used in place of --host and --port; whoever started the "
        "gateway keeps it open, so that clients wait while a crashed gateway is replaced",
    )
    lifeline_fd: int = option(-1, "inherited pipe; its end of file stops the gateway")
    handover_fd: int = option(
        -1,
        "inherited pipe; a gateway that was told to end and accepts no more writes its process id "
        "there, so that a successor takes over the socket of --listen-fd while its streams finish",
    )
    otlp_endpoint: str = option(
        "",
        "collector of OpenTelemetry traces over HTTP, such as http://collector:4318; needs the "
        "packages of starfish-moe[otel]. Default: no traces",
    )
    log_level: str = option("info", "debug, info, warning or error")
    log_json: bool = option(False, "log one JSON object per line instead of text")
    timings: Timings = field(default_factory=Timings)

    def check(self) -> None:
        """Raises ConfigError if a value is impossible."""
        self.store.check()
        self.timings.check()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together: pass both, or none")
        check_parser_names(self.tool_call_parser, self.reasoning_parser)
        if self.routing not in ROUTING_POLICIES:
            raise ConfigError(
                f"--routing {self.routing!r}: pass one of {', '.join(ROUTING_POLICIES)}"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: pass a port from 0 to 65535")
        if not -1 <= self.own_port <= 65535:
            raise ConfigError(f"--own-port {self.own_port}: pass a port from 0 to 65535, or -1")
        if min(self.tokens_in_flight_max, self.sessions_max, self.body_bytes_max) < 1:
            raise ConfigError(
                "--tokens-in-flight-max, --sessions-max and --body-bytes-max must be at least 1"
            )
        if min(self.grammar_bytes_max, self.grammar_properties_max, self.logprobs_max) < 1:
            raise ConfigError(
                "--grammar-bytes-max, --grammar-properties-max and --logprobs-max must be at "
                "least 1"
            )
        if self.grammar_compile_s <= 0 or self.grammar_memory_mb < GRAMMAR_MEMORY_MB_MIN:
            raise ConfigError(
                "--grammar-compile-s must be above 0, and --grammar-memory-mb at least "
                f"{GRAMMAR_MEMORY_MB_MIN}"
            )
        if min(self.connections_max, self.connections_per_address_max) < 1:
            raise ConfigError(
                "--connections-max and --connections-per-address-max must be at least 1"
            )
        if min(self.header_timeout_s, self.idle_timeout_s) <= 0:
            raise ConfigError("--header-timeout-s and --idle-timeout-s must be above 0")
        if self.no_rank_timeout_s <= 0 or self.drain_s < 0:
            raise ConfigError("--no-rank-timeout-s must be above 0, and --drain-s at least 0")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"--log-level {self.log_level!r}: pass debug, info, warning or error")
