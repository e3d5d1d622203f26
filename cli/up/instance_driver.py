"""Starts an instance stage by stage, keeps it running, and stops it in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from cli.client_headers import client_headers
from cli.observe.status import read_status
from cli.run_dir import (
    RunState,
    Target,
    state_of_store,
    write_state,
)
from cli.up import services
from cli.up.cleanup_watchdog_process import CleanupWatchdog
from cli.up.demo import stream_demo
from cli.up.device import count_gpus, num_visible_gpus, plan_device
from cli.up.instance_claim import InstanceClaim, owner_record
from cli.up.leader_lease import revoke_leader_lease
from cli.up.leftovers import kill_leftovers
from cli.up.log_limit import keep_logs_small
from cli.up.model import check_model, seeded_model, shipped_model
from cli.up.mps import CudaMps
from cli.up.next_steps import next_steps
from cli.up.options import UpOptions
from cli.up.readiness import wait_for_gateways, wait_for_map
from cli.up.restart_backoff import RestartBackoff
from cli.up.run_folder import RunFolder
from cli.up.stages import Stages
from cli.up.supervisor import Supervisor
from shared.clock import Clock
from shared.embedded_etcd import EmbeddedEtcd
from shared.errors import StarfishError, StoreUnavailable, Unavailable
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import EtcdService
from shared.etcd_store import EtcdStore, connect_store
from shared.exit_codes import describe_exit
from shared.keys import Keys
from shared.listener import ADMIN_LISTEN_FLAGS, listen_on


def url_of(options: UpOptions) -> str:
    """Of the HTTP API."""
    scheme = "https" if options.tls_cert else "http"
    return f"{scheme}://{options.host}:{options.port}"


class InstanceDriver:
    """One instance. Call `start`, then `serve`; call `stop` at the end, whatever happened."""

    def __init__(
        self, options: UpOptions, folder: RunFolder, console: Console, clock: Clock
    ) -> None:
        self._options = options
        self._folder = folder
        self._console = console
        self._clock = clock
        self._stages = Stages(console, clock)
        self._keys = Keys(options.instance)
        self._url = url_of(options)
        self._owner = owner_record(clock, self._url)
        self._supervisor = Supervisor(
            folder.log_dir,
            clock,
            run=self._owner.run,
            warn=self._stages.warn,
            revoke_leadership=self._revoke_leadership,
        )
        self._cleanup_watchdog = CleanupWatchdog(self._supervisor.lifeline_fd, folder)
        self._etcd: EmbeddedEtcd | None = None  # None: the instance uses an etcd that runs already
        self._mps: CudaMps | None = None
        self._store: EtcdStore | None = None
        self._claim: InstanceClaim | None = None
        self._stores: Mapping[EtcdService, EtcdOptions] = {}
        self._listeners: list[socket.socket] = []
        self._admin_listener: socket.socket | None = None
        self._services: list[services.Service] = []
        self._standbys: list[services.Standby] = []
        self.is_serving = False

    async def start(self) -> None:
        """Raises StarfishError."""
        options = self._options
        try:
            async with asyncio.timeout(options.timeout_s):
                await self._device()
                model = await self._model()
                await self._start_etcd()
                async with (await self._claim_instance()).held():
                    await self._start_services(model)
                    await self._wait_until_serving()
                    await self._start_standbys()
        except TimeoutError:
            raise Unavailable(
                f"the instance did not serve within {options.timeout_s:.0f} s; "
                f"see the logs in {self._folder.log_dir}, or pass a longer --timeout-s"
            ) from None
        write_state(
            options.run_dir,
            RunState(
                instance=options.instance,
                url=self._url,
                pid=os.getpid(),
                model=str(model),
                secret_file=str(options.secret_file),
                admin_url=self._admin_url(),
                admin_token_file=str(options.admin_token_file),
                admin_ca=str(options.admin_authority or ""),
                metrics_ports=options.metrics_ports,
                **state_of_store(self._stores[EtcdService.READER]),
            ),
        )
        self.is_serving = True
        if options.is_open_to_all:
            self._stages.warn(
                f"{options.host} can be reached from other hosts, and nobody needs an API key: "
                "whoever reaches it is served. Pass --api-key-file (`starfish keys new NAME` makes "
                "a key), or --host 127.0.0.1"
            )
        headers = client_headers(os.environ)
        if options.demo and (headers or not options.needs_api_key):
            self._console.print(await stream_demo(self._url, self._console, self._clock, headers))
        await self._print_next_steps()

    async def serve(self) -> None:
        """Restarts whatever crashes, until cancelled."""
        assert self._claim is not None, "`start` comes first"
        async with self._claim.held(), asyncio.TaskGroup() as tasks:
            for service in self._services:
                tasks.create_task(self._supervisor.supervise(service))
            for standby in self._standbys:
                tasks.create_task(self._supervisor.keep_standby(standby))
            if self._etcd is not None:
                tasks.create_task(self._restart_etcd_on_exit(self._etcd))
            logs = (self._folder.log_dir, self._options.run_dir / "etcd")
            tasks.create_task(keep_logs_small(logs, int(self._options.log_mb_max * 1e6)))

    async def stop(self, *, keep_logs: bool) -> None:
        """Stops the gateways first, all at once, and etcd last. A gateway answers 503 while its
        streams finish. Only the logs remain, if they are to be kept."""
        self._console.print("stopping …", highlight=False)
        for listener in self._listeners:
            listener.close()  # the last gateway that ends has clients refused instead of queued
        if self._admin_listener is not None:
            self._admin_listener.close()
        gateways = [s for s in self._services if s.standby == services.GATEWAY_STANDBY]
        await self._supervisor.stop(*gateways)
        for service in reversed(self._services):
            if service not in gateways:
                await self._supervisor.stop(service)
        kill_leftovers(self._owner.run)
        if self._claim is not None:
            await self._claim.release()
        if self._store is not None:
            await self._store.close()
        if self._etcd is not None:
            await self._etcd.stop()
        if self._mps is not None:
            await self._mps.stop()
        await self._cleanup_watchdog.stop()
        self._supervisor.close_lifeline()
        self._folder.remove_files(keep_logs=keep_logs)

    def kill_now(self) -> None:
        """Kills without waiting, and removes what the run has created. When this process ends, the
        lifeline ends and stops the rest."""
        self._supervisor.kill_all()
        kill_leftovers(self._owner.run)
        if self._etcd is not None:
            self._etcd.kill_now()
        self._folder.remove_files(keep_logs=False)

    async def _device(self) -> None:
        options = self._options
        num_gpus = (
            0 if options.device == "cpu" else num_visible_gpus(await count_gpus(), os.environ)
        )
        plan = plan_device(
            options.device, options.cuda_mps, max(options.ranks, options.ranks_max), num_gpus
        )
        with self._stages.stage("device") as stage:
            if plan.mps:
                self._mps = CudaMps(options.run_dir)
                await self._mps.start()
            stage.result = str(plan)

    async def _model(self) -> Path:
        with self._stages.stage("model") as stage:
            folder = self._options.model
            if folder is None and not self._options.seeded:
                folder = shipped_model()
            if folder is None:
                folder = await seeded_model(self._options.model_dir, stage)
            stage.result = await check_model(folder, self._options.speculative_tokens)
        return folder

    async def _start_etcd(self) -> None:
        options = self._options
        with self._stages.stage("etcd") as stage:
            if options.etcd:
                self._stores = options.stores(self._keys)
                self._store = await connect_store(self._stores[EtcdService.OPERATOR])
                stage.result = f"using the one at {options.etcd}"
            else:
                self._etcd = EmbeddedEtcd(
                    options.run_dir / "etcd",
                    clock=self._clock,
                    on_spawned=self._start_cleanup_watchdog,
                    on_damaged=self._stages.warn,
                )
                await self._etcd.start(on_progress=stage.update)
                await self._etcd.admit(self._keys)
                self._stores = {s: self._etcd.options(self._keys, s) for s in EtcdService}
                self._store = await connect_store(self._stores[EtcdService.OPERATOR])
                stage.result = f"embedded, at {self._etcd.endpoint}"
        if self._etcd is None:
            await self._start_cleanup_watchdog()

    async def _claim_instance(self) -> InstanceClaim:
        """Raises ConfigError if another `starfish up` has it."""
        assert self._store is not None, "etcd comes first"
        claim = InstanceClaim(self._store, self._keys, self._owner, self._stages.warn)
        await claim.take()
        self._claim = claim
        return claim

    async def _revoke_leadership(self, pid: int) -> bool:
        return self._store is not None and await revoke_leader_lease(self._store, self._keys, pid)

    async def _start_services(self, model: Path) -> None:
        options, stores = self._options, self._stores
        self._admin_listener = listen_on(
            options.admin_host, options.admin_port, flags=ADMIN_LISTEN_FLAGS
        )
        admin_fd = self._admin_listener.fileno()
        planned = [
            *(
                services.control_plane(
                    options, stores[EtcdService.CONTROL_PLANE], model, number, admin_fd
                )
                for number in range(options.control_planes)
            ),
            services.agent(
                options,
                stores[EtcdService.AGENT],
                stores[EtcdService.RANK],
                model,
                self._folder.log_dir,
                self._mps.environment if self._mps is not None else {},
            ),
            *services.gateways(options, stores[EtcdService.GATEWAY], self._listen()),
        ]
        for service in planned:
            await self._supervisor.start(service)
            self._services.append(service)

    async def _start_standbys(self) -> None:
        """Now that their imports delay nothing else."""
        fds = [listener.fileno() for listener in self._listeners]
        etcd = self._stores[EtcdService.GATEWAY]
        self._standbys = [services.gateway_standby(self._options, etcd, fds)]
        for standby in self._standbys:
            await self._supervisor.start_standby(standby)

    def _listen(self) -> list[int]:
        """A socket for each gateway, which stay open as long as the instance runs. Raises
        ConfigError."""
        options = self._options
        for _ in range(options.gateways):
            shared = options.gateways > 1
            self._listeners.append(listen_on(options.host, options.port, reuse_port=shared))
        return [listener.fileno() for listener in self._listeners]

    def _admin_url(self) -> str:
        assert self._admin_listener is not None, "the control planes come first"
        host, port = self._admin_listener.getsockname()[:2]
        scheme = "https" if self._options.admin_tls_cert else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def _wait_until_serving(self) -> None:
        num_ranks = self._options.ranks
        store = await connect_store(self._stores[EtcdService.READER])
        try:
            with self._stages.stage(f"{num_ranks} ranks") as stage:

                def show(registered: str) -> None:
                    text = self._supervisor.preparation() or registered
                    capture = self._first_of(self._supervisor.capture)
                    text = text if capture is None else f"{text}; {capture}"
                    crash = self._first_of(self._supervisor.crashes)
                    stage.update(text if crash is None else f"{text}; {crash}")

                stage.result = await wait_for_map(
                    store, self._keys, num_ranks, show, self._require_alive
                )
            await self._wait_for_gateways(store)
        finally:
            await store.close()

    def _first_of(self, said: Callable[[str], str | None]) -> str | None:
        """What is said of the first rank of which anything is."""
        names = (f"rank-{rank}" for rank in range(self._options.ranks))
        return next(filter(None, map(said, names)), None)

    async def _wait_for_gateways(self, store: EtcdStore) -> None:
        number = self._options.gateways
        with self._stages.stage("gateway" if number == 1 else f"{number} gateways") as stage:
            await wait_for_gateways(store, self._keys, number, self._url, self._require_alive)
            stage.result = self._url

    def _require_alive(self) -> None:
        """During the start, raises Unavailable with a service's own message if it has exited."""
        for service in self._services:
            self._supervisor.require_alive(service)
        for rank in range(self._options.ranks):
            startup_error = self._supervisor.startup_error(f"rank-{rank}")
            if startup_error is not None:
                raise Unavailable(startup_error)

    async def _restart_etcd_on_exit(self, etcd: EmbeddedEtcd) -> None:
        while True:
            code = await etcd.wait()
            self._stages.warn(f"etcd {describe_exit(code)}; serving continues, restarting it")
            await self._restart_etcd(etcd)

    async def _restart_etcd(self, etcd: EmbeddedEtcd) -> None:
        """Tries for as long as it takes: the disk may be full, or the host short of memory. Ranks
        and gateways go on with what they know."""
        backoff, told = RestartBackoff(), ""
        while True:
            try:
                await etcd.start()
            except (StoreUnavailable, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    self._stages.warn(f"etcd does not start; serving continues: {error}")
                await asyncio.sleep(backoff.on_exit(0.0, led=False) * random.uniform(1.0, 1.5))
            else:
                break
        self._stages.warn("etcd serves again")

    async def _start_cleanup_watchdog(self) -> None:
        """For the daemons, which do not hold the lifeline. etcd's start calls it, too, before etcd
        serves: a full disk may keep it from that for long."""
        daemons = (self._etcd, self._mps)
        try:
            await self._cleanup_watchdog.start(d.pid for d in daemons if d is not None)
        except OSError as error:
            self._stages.warn(f"nobody ends etcd if this process is killed: {error.strerror}")

    async def _print_next_steps(self) -> None:
        target = Target(
            store=self._stores[EtcdService.READER],
            instance=self._options.instance,
            secret_file=self._options.secret_file,
        )
        with contextlib.suppress(StarfishError):  # etcd may be away: serving goes on without it
            if survived := (await read_status(target, self._clock))["survives"]:
                self._console.print(survived["summary"], highlight=False)
        for text in next_steps(self._options, self._folder, self._url, self._admin_url()):
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
