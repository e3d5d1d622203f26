"""`python -m node_agent`: the wiring of a node agent."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from pathlib import Path

import structlog

from node_agent.agent_driver import AgentDriver, RankSetup
from node_agent.config import AgentConfig
from node_agent.cpu_share import share_cpus
from node_agent.exit_report import ExitReporter
from node_agent.expert_cache import with_expert_cache
from node_agent.fork_client import ForkClient, ForkServerCommand
from node_agent.metrics import AgentMetrics
from node_agent.rank_list import parse_ranks
from node_agent.rank_process import RankCommand
from node_agent.rank_supervisor import RankSupervisor
from node_agent.restart_policy import RestartPolicy
from node_agent.view_reporter import ViewReporter
from shared.clock import Clock, SystemClock
from shared.config import add_flags, load_config
from shared.confinement import confined_environment, require_internal
from shared.errors import ConfigError, StarfishError
from shared.etcd_store import EtcdStore
from shared.garbage_collector import freeze_loaded_objects
from shared.handshake import Access
from shared.keys import Keys
from shared.leased_keys import LeasedKeys
from shared.lifeline import watch_lifeline
from shared.logs import configure_logs
from shared.records import AgentRecord, pack_record
from shared.secret import read_secret, require_secret
from shared.types import NodeId, RankId

log = structlog.get_logger()

_LIFELINE_GRACE_S = 1.0
_FORK_SERVER = (sys.executable, "-m", "gpu_worker.fork_server")


def main() -> int:
    try:
        config, rank_flags = parse(sys.argv[1:])
        configure_logs(
            service="agent", level=config.log_level, json=config.log_json, node=config.node_name
        )
        if not config.public_data_host:
            require_internal(config.data_host)
        read_secret(config.secret_file)  # says at once what the ranks would say
        setup = RankSetup(
            command=with_expert_cache(rank_command(config, rank_flags), config.host_experts_gb),
            environment=confined_environment(os.environ, config.data_host),
            log_dir=config.log_dir,
            lease_ttl_s=config.lease_ttl_s,
            stop_grace_s=config.stop_grace_s,
            dying_poll_s=config.dying_poll_ms / 1000,
            cpus=cpu_shares(config),
            fork_server=_FORK_SERVER if config.fork_ranks else (),
        )
        asyncio.run(run_agent(config, setup))
    except (StarfishError, OSError) as error:
        print(f"starfish agent: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str]) -> tuple[AgentConfig, tuple[str, ...]]:
    """The agent's configuration, and the arguments after `--`. Raises ConfigError."""
    own, rank_flags = list(arguments), []
    if "--" in own:
        split = own.index("--")
        own, rank_flags = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m node_agent",
        description="Starts a host's ranks and reports to etcd at once when one exits. The "
        "arguments after -- go to every rank.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with an [agent] section"
    )
    add_flags(parser, AgentConfig)
    flags = vars(parser.parse_args(own))
    config = load_config(
        AgentConfig, section="agent", file=flags.pop("config"), environ=os.environ, flags=flags
    )
    config.check()
    return config, tuple(rank_flags)


def rank_command(config: AgentConfig, rank_flags: Sequence[str]) -> RankCommand:
    model = () if config.model is None else ("--model", str(config.model))
    logs = ("--log-level", config.log_level, *(("--log-json",) if config.log_json else ()))
    # Addresses, not names: a name may resolve differently on the hosts of the ranks' peers.
    control_host = address_of(config.control_host)
    require_secret(control_host, config.secret_file)
    hosts = (
        *("--control-host", control_host),
        *("--data-host", address_of(config.data_host)),
        *(("--public-data-host",) if config.public_data_host else ()),
    )
    ttl = ("--lease-ttl-s", str(config.lease_ttl_s))
    secret = () if config.secret_file is None else ("--secret-file", str(config.secret_file))
    return RankCommand(
        node=NodeId(config.node_name),
        store=config.store,
        instance=config.instance,
        lifeline_fd=config.lifeline_fd,
        extra_flags=(*model, *hosts, *ttl, *secret, *logs, *rank_flags),
    )


def address_of(host: str) -> str:
    """Raises ConfigError if the name is unknown."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(
            f"cannot resolve host {host!r}: {error.strerror}; pass an address"
        ) from error


def cpu_shares(config: AgentConfig) -> dict[RankId, frozenset[int]]:
    if not config.pin_cpus:
        return {}
    return share_cpus(sorted(os.sched_getaffinity(0)), parse_ranks(config.ranks))


def fork_client_of(setup: RankSetup, clock: Clock) -> ForkClient | None:
    if not setup.fork_server:
        return None
    return ForkClient(
        clock=clock,
        command=ForkServerCommand(
            program=setup.fork_server,
            flags=setup.command.common_flags,
            environment=setup.environment,
            pass_fds=setup.command.shared_fds,
        ),
    )


async def run_agent(config: AgentConfig, setup: RankSetup) -> None:
    """Runs until SIGTERM, SIGINT, or the end of the lifeline."""
    clock, keys, node = SystemClock(), Keys(config.instance), setup.command.node
    ranks = parse_ranks(config.ranks)
    if setup.log_dir is not None:
        setup.log_dir.mkdir(parents=True, exist_ok=True)
    store = EtcdStore(config.store)
    leased = LeasedKeys(store, ttl_s=config.lease_ttl_s)
    access = Access(config.instance, read_secret(config.secret_file))
    metrics = AgentMetrics(node, config.instance, access)
    supervisor = RankSupervisor(ranks, RestartPolicy(), random.Random(), clock.now())
    driver = AgentDriver(
        store=store,
        keys=keys,
        supervisor=supervisor,
        leased=leased,
        exit_reporter=ExitReporter(store, keys, node, clock),
        view_reporter=ViewReporter(
            store=store, keys=keys, clock=clock, leased=leased, alive=supervisor.alive
        ),
        setup=setup,
        clock=clock,
        fork_client=fork_client_of(setup, clock),
        metrics=metrics,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, driver.stop)
    watch_lifeline(config.lifeline_fd, lambda: driver.stop(grace_s=_LIFELINE_GRACE_S))
    freeze_loaded_objects()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        record = AgentRecord(node=node, pid=os.getpid(), ranks=ranks)
        if config.metrics_port >= 0:
            host = config.metrics_host
            endpoint = serve_metrics(metrics, host, config.metrics_port)
            port = await stack.enter_async_context(endpoint)
            record = replace(record, host=host, metrics_port=port)
            log.info("listening", host=host, port=port)
        leased.put(keys.agent(node), pack_record(record))
        await driver.run()


def serve_metrics(metrics: AgentMetrics, host: str, port: int) -> AbstractAsyncContextManager[int]:
    """See `serve_routes`. An agent that serves none need not load the HTTP library."""
    from aiohttp import web

    from shared.metrics_endpoint import metrics_handler, serve_routes

    handler = metrics_handler(metrics.registry, metrics.update)
    return serve_routes([web.get("/metrics", handler)], host=host, port=port)


if __name__ == "__main__":
    sys.exit(main())
