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
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import structlog

from node_agent.agent_driver import AgentDriver, RankSetup
from node_agent.cards import Cards, count_cards
from node_agent.config import AgentConfig
from node_agent.desired_ranks import DesiredRanks
from node_agent.exit_report import ExitReporter
from node_agent.expert_cache import with_expert_cache
from node_agent.fork_client import ForkClient, ForkServerCommand
from node_agent.metrics import AgentMetrics
from node_agent.own_record import OwnRecord
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
from shared.records import AgentRecord
from shared.release import own_release
from shared.secret import read_secret, require_secret
from shared.types import NodeId, RankId

log = structlog.get_logger()

_ABOUT = """Runs the ranks of one host: starts them, tells etcd at once when one exits, and starts
it again. An instance over several hosts has one agent on each, with ranks of its own. The
arguments after -- go to every rank (`python -m gpu_worker --help`)."""
_EXAMPLE = """example, the second host of two with eight cards each:
  starfish agent --etcd etcd-1:2379,etcd-2:2379,etcd-3:2379 --etcd-ca ca.pem
    --etcd-cert agent.pem --etcd-key agent.key --node host-2 --ranks 8-15 --device cuda
    --control-host 10.0.0.2 --data-host 10.1.0.2 --secret-file secret"""
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
            cpus=sorted(os.sched_getaffinity(0)) if config.pin_cpus else (),
            leave_grace_s=config.leave_grace_s,
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
        prog="starfish agent",
        description=_ABOUT,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    protocol, rdma = config.transfer_protocol, config.mooncake_ib_device
    hardware = (
        *(("--device", config.device) if config.device != "auto" else ()),
        *(("--transfer-protocol", protocol) if protocol != "tcp" else ()),
        *(("--mooncake-ib-device", rdma) if rdma else ()),
    )
    return RankCommand(
        node=NodeId(config.node_name),
        store=config.rank_store,
        instance=config.instance,
        lifeline_fd=config.lifeline_fd,
        control_ports=control_ports(config),
        extra_flags=(*model, *hosts, *hardware, *ttl, *secret, *logs, *rank_flags),
    )


def control_ports(config: AgentConfig) -> dict[RankId, int]:
    """Empty if each rank takes a free one."""
    if not config.control_port:
        return {}
    return {
        rank: config.control_port + place for place, rank in enumerate(parse_ranks(config.ranks))
    }


def address_of(host: str) -> str:
    """Raises ConfigError if the name is unknown."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(
            f"cannot resolve host {host!r}: {error.strerror}; pass an address"
        ) from error


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
    """Runs until SIGINT or the end of the lifeline, or until SIGTERM, and its ranks are drained.
    Raises ConfigError if the port of its metrics is taken, before a rank is started."""
    clock, keys, node = SystemClock(), Keys(config.instance), setup.command.node
    ranks = parse_ranks(config.ranks)
    if setup.log_dir is not None:
        setup.log_dir.mkdir(parents=True, exist_ok=True)
    store = EtcdStore(config.store)
    leased = LeasedKeys(store, ttl_s=config.lease_ttl_s)
    access = Access(config.instance, read_secret(config.secret_file))
    metrics = AgentMetrics(node, config.instance, access)
    supervisor = RankSupervisor(
        (), RestartPolicy(), random.Random(), clock.now(), stop_grace_s=config.stop_grace_s
    )
    record = AgentRecord(
        node=node,
        pid=os.getpid(),
        ranks=ranks,
        ranks_max=config.ranks_max,
        release=own_release(),
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        if config.metrics_port >= 0:
            from node_agent.http_endpoint import serve_http  # loads the HTTP library

            host = config.metrics_host
            endpoint = serve_http(
                supervisor, metrics, store, keys, host=host, port=config.metrics_port
            )
            port = await stack.enter_async_context(endpoint)
            record = replace(record, host=host, metrics_port=port)
            log.info("listening", host=host, port=port)
        own_record = OwnRecord(record=record, leased=leased, keys=keys, clock=clock)
        own_record.put()
        driver = AgentDriver(
            store=store,
            keys=keys,
            supervisor=supervisor,
            desired_ranks=DesiredRanks(node=node, flag_ranks=ranks),
            own_record=own_record,
            leased=leased,
            exit_reporter=ExitReporter(store, keys, node, clock),
            view_reporter=ViewReporter(
                store=store, keys=keys, clock=clock, leased=leased, alive=supervisor.alive
            ),
            setup=setup,
            clock=clock,
            fork_client=fork_client_of(setup, clock),
            metrics=metrics,
            cards=Cards(count_cards(config.device, setup.command.extra_flags, os.environ)),
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, driver.stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, driver.leave)
        watch_lifeline(config.lifeline_fd, lambda: driver.stop(grace_s=_LIFELINE_GRACE_S))
        freeze_loaded_objects()
        await driver.run()


if __name__ == "__main__":
    sys.exit(main())
