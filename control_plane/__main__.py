"""`python -m control_plane`: the wiring of one control plane process."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from control_plane.admin.admin_app import AdminApp
from control_plane.admin.admin_server import serving
from control_plane.admin.authentication import read_admin_token
from control_plane.admin.client_figures import ClientFigures, gateways_of
from control_plane.config import ControlPlaneConfig, instance_spec
from control_plane.control_driver import Driver
from control_plane.detector_timings import DetectorTimings
from control_plane.etcd_health_watch import EtcdHealthWatch
from control_plane.membership import MembershipPolicy
from control_plane.planned_change import DrainPolicy
from control_plane.rebalancer import RebalancePolicy
from control_plane.telemetry import Metrics, http_endpoint
from shared.clock import SystemClock
from shared.config import add_flags, load_config
from shared.errors import StarfishError
from shared.etcd_store import connect_store
from shared.expert_bytes import expert_bytes
from shared.garbage_collector import freeze_loaded_objects
from shared.handshake import Access
from shared.keys import Keys
from shared.lifeline import watch_lifeline
from shared.listener import ADMIN_LISTEN_FLAGS, inherited_listener, listen_on
from shared.logs import configure_logs
from shared.model_spec import read_model_spec, with_drafts
from shared.secret import read_secret
from shared.server_certificate import ServerCertificate, trusting

log = structlog.get_logger()

_ABOUT = """Watches the ranks of a Starfish instance, decides which of them are dead and which
experts go where, and publishes the map. Run two or three, on different hosts and with the same
options: one leads, the others stand by. Serving goes on without any."""
_EXAMPLE = """example, for an instance of 16 ranks:
  starfish control-plane --etcd etcd-1:2379,etcd-2:2379,etcd-3:2379 --etcd-ca ca.pem
    --etcd-cert control-plane.pem --etcd-key control-plane.key --model /models/qwen3-30b-a3b
    --ranks 16 --secret-file secret --host 10.0.0.2 --port 9100"""
_SWITCH_INTERVAL_S = 0.0005  # a heal is planned in a thread, and a death must not wait for it


def main() -> int:
    errors: list[StarfishError] = []
    try:
        config = parse(sys.argv[1:])
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        configure_logs(service="control_plane", level=config.log_level, json=config.log_json)
        asyncio.run(serve(config))
    except* StarfishError as group:
        errors = _leaves(group)
    for error in errors:
        print(f"starfish control plane: {error}", file=sys.stderr)
    return 1 if errors else 0


def parse(arguments: Sequence[str]) -> ControlPlaneConfig:
    """Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="starfish control-plane",
        description=_ABOUT,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML with [control_plane]")
    add_flags(parser, ControlPlaneConfig)
    flags = vars(parser.parse_args(list(arguments)))
    config = load_config(
        ControlPlaneConfig,
        section="control_plane",
        file=flags.pop("config"),
        environ=os.environ,
        flags=flags,
    )
    config.check()
    return config


async def serve(config: ControlPlaneConfig) -> None:
    """Runs until SIGTERM, SIGINT or the end of the lifeline. Raises StarfishError."""
    model = with_drafts(read_model_spec(config.model_folder), config.speculative_tokens)
    access = Access(config.instance, read_secret(config.secret_file))
    metrics = Metrics()
    stop = stop_event(config.lifeline_fd)
    async with AsyncExitStack() as stack:
        store = await connect_store(config.store)
        stack.push_async_callback(store.close)
        clock = SystemClock()
        admin = open_admin_api(config)
        driver = Driver(
            store=store,
            keys=Keys(config.instance),
            clock=clock,
            name=config.unique_name(os.getpid()),
            access=access,
            spec=instance_spec(config, model),
            policy=MembershipPolicy(
                bytes_per_expert=expert_bytes(model),
                formation_grace_s=config.formation_grace_s,
                first_formation_grace_s=config.first_formation_grace_s,
                formation_window_s=config.formation_window_s,
                heal_after_s=config.heal_after_s,
                heal_budget_bytes=config.heal_budget_mb << 20,
                drains=DrainPolicy(straggler_after_s=config.drain_stragglers_after_s),
                rebalance=RebalancePolicy(
                    enabled=config.rebalance,
                    time_constant_s=config.load_time_constant_s,
                    threshold=config.rebalance_threshold,
                ),
            ),
            timings=DetectorTimings(
                silence=config.silence,
                reregister_timeout_s=0.4 * config.timings.lease_ttl_s,
                mass_expiry_grace_s=config.timings.lease_ttl_s,
                probe_silence_s=2.4 * config.probe_interval_ms / 1000,
            ),
            leader_ttl_s=config.leader_ttl_s,
            probe_interval_s=config.probe_interval_ms / 1000,
            urgent_probe_interval_s=config.urgent_probe_interval_ms / 1000,
            counts_interval_s=config.load_interval_s,
            metrics=metrics,
            admin_url=admin.url if admin is not None else "",
        )
        if admin is not None:
            app = AdminApp(
                driver,
                token=admin.token,
                url=admin.url,
                clock=clock,
                figures=ClientFigures(gateways_of(store, Keys(config.instance), clock.now)),
                can_kill=config.allow_kill,
                peer_tls=admin.peer_tls,
            )
            tls = admin.certificate.context if admin.certificate is not None else None
            await stack.enter_async_context(serving(app, admin.listeners, tls))
            log.info("admin_api_listening", url=admin.url)
        etcd_watch = EtcdHealthWatch(store, metrics)
        if config.port >= 0:

            def health() -> dict[str, object]:
                return {**driver.health(), "etcd_alarms": list(etcd_watch.alarms)}

            endpoint = http_endpoint(metrics, health, host=config.host, port=config.port)
            port = await stack.enter_async_context(endpoint)
            log.info("listening", host=config.host, port=port)
        freeze_loaded_objects()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(etcd_watch.run())]
            if admin is not None and admin.certificate is not None:
                background.append(tasks.create_task(admin.certificate.follow_files()))
            await driver.run(stop)
            for task in background:
                task.cancel()
        log.info("stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSockets:
    url: str
    token: bytes
    listeners: tuple[socket.socket, ...]
    certificate: ServerCertificate | None
    peer_tls: ssl.SSLContext | None


def open_admin_api(config: ControlPlaneConfig) -> AdminSockets | None:
    """None if there is none. Its address must be known before this process may lead. Raises
    ConfigError."""
    if config.admin_port < 0 or config.admin_token_file is None:
        return None
    token = read_admin_token(config.admin_token_file)
    peer_tls = None if config.admin_ca is None else trusting(config.admin_ca, flag="--admin-ca")
    certificate = None
    if config.admin_tls_cert is not None and config.admin_tls_key is not None:
        certificate = ServerCertificate(
            config.admin_tls_cert, config.admin_tls_key, flag="--admin-tls"
        )
    own = listen_on(config.admin_host, config.admin_port, flags=ADMIN_LISTEN_FLAGS)
    fd = config.admin_listen_fd
    shared = () if fd < 0 else (inherited_listener(fd, flag="--admin-listen-fd"),)
    url = config.admin_url(own.getsockname()[1])
    return AdminSockets(
        url=url,
        token=token,
        listeners=(own, *shared),
        certificate=certificate,
        peer_tls=peer_tls,
    )


def stop_event(lifeline_fd: int) -> asyncio.Event:
    """Set by SIGTERM, by SIGINT, and when the process at the other end of the lifeline is gone."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watch_lifeline(lifeline_fd, stop.set)
    return stop


def _leaves(group: BaseExceptionGroup[StarfishError]) -> list[StarfishError]:
    leaves: list[StarfishError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


if __name__ == "__main__":
    sys.exit(main())
