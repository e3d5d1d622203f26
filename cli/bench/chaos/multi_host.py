"""A site of several hosts, as network namespaces of this one."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console

from cli.bench.chaos.cluster import (
    CLIENT_PORT,
    HTTP_PORT,
    Cluster,
    ClusterPlan,
    require_enough,
    run_name,
)
from cli.bench.chaos.network import entered, network
from cli.bench.chaos.private_disk import private_disk
from cli.bench.chaos.processes import ProcessKind
from cli.bench.chaos.site import Site
from cli.bench.fault_observer import FaultObserver
from cli.bench.temporary_options import TemporaryInstanceOptions, parse_rank_options
from cli.run_dir import Target
from cli.up.model import default_model_dir, seeded_model
from cli.up.readiness import wait_for_map, wait_until_healthy
from cli.up.stages import Stage
from shared.clock import Clock
from shared.errors import StoreUnavailable, Unavailable
from shared.etcd_options import EtcdOptions
from shared.etcd_store import EtcdStore, connect_store
from shared.keys import Keys
from shared.secret import create_secret


@asynccontextmanager
async def cluster_site(
    options: TemporaryInstanceOptions, console: Console, clock: Clock, keep_logs: Path | None
) -> AsyncIterator[Site]:
    """This thread is in a namespace of the cluster's network meanwhile. Raises Unavailable if the
    host does not allow it, or the instance does not start."""
    require_enough(options.ranks)
    with (
        private_disk() as disk,
        tempfile.TemporaryDirectory(prefix="starfish-hosts-", dir=disk) as folder,
        network() as net,
    ):
        plan = await _plan(options, Path(folder), console)
        client = net.add("client")
        cluster = Cluster(network=net, client=client, hosts=plan.hosts(net, clock))
        with entered(client):
            try:
                target = await _start(cluster, plan, options, console)
                async with FaultObserver.watching(target) as observer:
                    gateways = cluster.namespaces(ProcessKind.GATEWAY)
                    yield Site(
                        urls=tuple(f"http://{g.address}:{HTTP_PORT}" for g in gateways),
                        mark=plan.run,
                        observer=observer,
                        folder=disk,
                        cluster=cluster,
                    )
            finally:
                net.heal()
                await cluster.stop()
                if keep_logs is not None:
                    for host in cluster.hosts:
                        shutil.copytree(host.folder, keep_logs / host.name, dirs_exist_ok=True)


async def _plan(options: TemporaryInstanceOptions, folder: Path, console: Console) -> ClusterPlan:
    model = options.model
    if model is None:
        with Stage(console, "model") as stage:
            model = await seeded_model(default_model_dir(), stage)
    secret = folder / "secret"
    create_secret(secret)
    rank_options = parse_rank_options(options.rank_options)
    return ClusterPlan(
        run=run_name(),
        instance=f"bench-{os.getpid()}",
        model=model.absolute(),
        secret_file=secret,
        folder=folder,
        ranks=options.ranks,
        device=options.device,
        redundant_experts=options.redundant_experts,
        slots_per_rank=options.slots_per_rank,
        rank_flags=tuple(
            part
            for name, value in rank_options.items()
            for part in (f"--{name.replace('_', '-')}", value)
        ),
    )


async def _start(
    cluster: Cluster, plan: ClusterPlan, options: TemporaryInstanceOptions, console: Console
) -> Target:
    etcds = cluster.namespaces(ProcessKind.ETCD)
    store_options = EtcdOptions(etcd=",".join(f"{each.address}:{CLIENT_PORT}" for each in etcds))
    keys = Keys(plan.instance)

    def require_alive() -> None:
        for host in cluster.hosts:
            host.require_alive()

    try:
        async with asyncio.timeout(options.start_timeout_s):
            with Stage(console, f"{len(cluster.hosts)} hosts, {plan.ranks} ranks") as stage:
                for host in cluster.hosts:
                    await host.power_on()
                store = await _connect(store_options)
                try:
                    stage.result = await wait_for_map(
                        store, keys, plan.ranks, stage.update, require_alive
                    )
                finally:
                    await store.close()
                for gateway in cluster.namespaces(ProcessKind.GATEWAY):
                    await wait_until_healthy(f"http://{gateway.address}:{HTTP_PORT}", require_alive)
    except TimeoutError:
        raise Unavailable(
            f"the instance did not serve within {options.start_timeout_s:.0f} s"
        ) from None
    return Target(store=store_options, instance=plan.instance, secret_file=plan.secret_file)


async def _connect(options: EtcdOptions) -> EtcdStore:
    """As soon as the etcd cluster has a leader."""
    while True:
        try:
            return await connect_store(options)
        except StoreUnavailable:
            continue
