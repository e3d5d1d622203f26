"""`python -m gateway`: reads the configuration, opens the port, reaches etcd, runs the gateway."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
import uvloop

from gateway.api_key_watch import ENVIRONMENT, ApiKeyWatch
from gateway.config import GatewayConfig
from gateway.descriptor_limit import allowed_connections
from gateway.service import GatewayDependencies, Listeners, run_gateway
from shared.clock import SystemClock
from shared.config import add_flags, load_config
from shared.errors import StarfishError
from shared.etcd_store import connect_store
from shared.garbage_collector import freeze_loaded_objects
from shared.handshake import Access
from shared.lifeline import watch_lifeline
from shared.listener import inherited_listener, listen_alone, listen_on
from shared.logs import configure_logs
from shared.secret import is_loopback, read_secret
from shared.tracing import open_tracer

log = structlog.get_logger()

_OPEN_HINT = (
    "whoever reaches this address is served, and the prefix cache tells what others have sent: "
    "pass --api-key-file (`starfish keys new NAME` makes a key), or --host 127.0.0.1"
)

SWITCH_INTERVAL_S = 0.0005
"""How long a thread that renders a huge chat may keep the event loop from running. Python's own
5 ms would come on top of every token of every stream."""

_ABOUT = """The HTTP gateway of a Starfish instance: OpenAI's API (/v1/chat/completions,
/v1/completions, /v1/models), /health and /metrics. It finds the ranks through etcd, sends each
request to a live rank, and if that rank dies, continues it on another one from the next token. It
keeps no state, so any number of gateways can run. STARFISH_API_KEYS holds API keys of clients
(NAME=KEY or NAME=sha256:…, separated by commas) in addition to those of --api-key-file."""
_EXAMPLE = """example, one of several behind a balancer that asks /health/ready:
  starfish gateway --etcd etcd-1:2379,etcd-2:2379,etcd-3:2379 --etcd-ca ca.pem
    --etcd-cert gateway.pem --etcd-key gateway.key --secret-file secret
    --host 0.0.0.0 --port 8000 --tls-cert server.pem --tls-key server.key
    --api-key-file keys.toml"""


def main() -> None:
    config = parse(sys.argv[1:])

    async def listeners() -> Listeners:
        return opened

    try:
        api_keys = read_api_keys(config)
        opened = _listen(config)
    except StarfishError as error:
        sys.exit(f"gateway: {error}")
    warn_if_open(opened, api_keys)
    with contextlib.ExitStack() as sockets:
        for listener in opened.sockets():
            sockets.enter_context(listener)
        serve(config, api_keys, listeners)


def parse(arguments: Sequence[str]) -> GatewayConfig:
    """Exits if the configuration is impossible."""
    parser = argparse.ArgumentParser(
        prog="starfish gateway",
        description=_ABOUT,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with a [gateway] section"
    )
    add_flags(parser, GatewayConfig)
    flags = vars(parser.parse_args(list(arguments)))
    try:
        config = load_config(
            GatewayConfig,
            section="gateway",
            file=flags.pop("config"),
            environ=os.environ,
            flags=flags,
        )
        config.check()
    except StarfishError as error:
        sys.exit(f"gateway: {error}")
    configure_logs(service="gateway", level=config.log_level, json=config.log_json)
    return replace(config, connections_max=allowed_connections(config.connections_max))


def read_api_keys(config: GatewayConfig) -> ApiKeyWatch:
    """Raises ConfigError."""
    return ApiKeyWatch(config.api_key_file, os.environ.get(ENVIRONMENT, ""))


def warn_if_open(listeners: Listeners, api_keys: ApiKeyWatch) -> None:
    host, port = listeners.shared.getsockname()[:2]
    if not len(api_keys.keys) and not is_loopback(str(host)):
        log.warning("gateway_open_to_all", host=host, port=port, do=_OPEN_HINT)


def serve(
    config: GatewayConfig,
    api_keys: ApiKeyWatch,
    listeners: Callable[[], Awaitable[Listeners | None]],
) -> None:
    """Runs the gateway, which asks for its `listeners` once all else is ready; None ends it. Exits
    if it fails."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        uvloop.run(_run(config, api_keys, listeners))
    except* StarfishError as group:
        sys.exit(f"gateway: {_first(group)}")
    except* KeyboardInterrupt:
        sys.exit(130)


async def _run(
    config: GatewayConfig,
    api_keys: ApiKeyWatch,
    listeners: Callable[[], Awaitable[Listeners | None]],
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watch_lifeline(config.lifeline_fd, stop.set)
    access = Access(config.instance, read_secret(config.secret_file))
    loop.add_signal_handler(signal.SIGHUP, api_keys.reload_now)
    clock = SystemClock()
    attributes = {"starfish.instance": config.instance, "host.name": socket.gethostname()}
    tracer = open_tracer(
        config.otlp_endpoint, clock, service="starfish-gateway", attributes=attributes
    )
    freeze_loaded_objects()
    store = await connect_store(config.store)
    try:
        await run_gateway(
            config,
            GatewayDependencies(
                store=store,
                clock=clock,
                listeners=listeners,
                stop=stop,
                access=access,
                api_keys=api_keys,
                tracer=tracer,
            ),
        )
    finally:
        await store.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


def _listen(config: GatewayConfig) -> Listeners:
    """Raises ConfigError."""
    if config.listen_fd >= 0:
        shared = inherited_listener(config.listen_fd)
    else:
        shared = listen_on(config.host, config.port, reuse_port=config.reuse_port)
    return Listeners(shared, listen_alone(shared, config.own_port))


def _first(group: BaseExceptionGroup[StarfishError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
