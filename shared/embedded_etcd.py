"""A single etcd as a child process: the default of `starfish up`, and the etcd of the integration
tests. It hears nobody without a certificate, and lets each service write its own keys alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path

from shared.clock import Clock, SystemClock
from shared.errors import StoreError, StoreUnavailable
from shared.etcd_admin import EtcdAdmin
from shared.etcd_binary import etcd_binary
from shared.etcd_certificates import SERVER, CertificateAuthority
from shared.etcd_data import is_damaged, set_aside
from shared.etcd_options import EtcdOptions
from shared.etcd_permissions import ROOT, EtcdService, accounts, user_of
from shared.etcd_store import EtcdStore
from shared.free_ports import free_ports
from shared.keys import Keys
from shared.logs import open_log

_HOST = "127.0.0.1"
_START_ATTEMPTS = 3
_STOP_TIMEOUT_S = 5.0
_COMPACT_AFTER_REVISIONS = 10_000


class EmbeddedEtcd:
    """Chooses its ports at the first start and keeps them, so that clients reconnect after a
    restart."""

    def __init__(
        self,
        data_dir: Path,
        *,
        clock: Clock | None = None,
        token_ttl_s: int = 300,
        on_spawned: Callable[[], Awaitable[None]] | None = None,
        on_damaged: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`token_ttl_s` is for users with passwords, of which there are none unless somebody makes
        them. `on_spawned` is awaited as soon as there is a process, long before it serves: whoever
        must end it if this process dies can learn its pid then. `on_damaged` gets a sentence when
        data from which etcd cannot start were set aside, so that it starts without them."""
        self._data_dir = data_dir
        self._token_ttl_s = token_ttl_s
        self._authority: CertificateAuthority | None = None
        self._root: EtcdOptions | None = None
        self._instances: dict[Keys, None] = {}
        self._on_spawned = on_spawned
        self._on_damaged = on_damaged
        self._clock = clock or SystemClock()
        self._client_port = 0
        self._peer_port = 0
        self._process: asyncio.subprocess.Process | None = None
        self._has_served = False
        self._log_start = 0  # of the present process, in bytes

    @property
    def endpoint(self) -> str:
        assert self._client_port, "etcd was never started"
        return f"{_HOST}:{self._client_port}"

    @property
    def root(self) -> EtcdOptions:
        """For its user who may do everything."""
        assert self._root is not None, "etcd was never started"
        return replace(self._root, etcd=self.endpoint)

    @property
    def credentials(self) -> Path:
        """The folder with the certificates of all users."""
        return self._data_dir / "tls"

    def options(self, keys: Keys, service: EtcdService) -> EtcdOptions:
        """For this service of an instance that was admitted."""
        assert keys in self._instances, "`admit` comes first"
        assert self._authority is not None, "etcd was never started"
        user = user_of(keys, service)
        return EtcdOptions(
            etcd=self.endpoint,
            etcd_ca=self._authority.ca_path,
            etcd_cert=self.credentials / f"{user}.pem",
            etcd_key=self.credentials / f"{user}.key",
        )

    async def admit(self, keys: Keys) -> None:
        """Makes the users of this instance, now and after each start. Idempotent. Raises
        StoreError, OSError."""
        if keys in self._instances:
            return
        assert self._authority is not None, "etcd was never started"
        for account in accounts(keys):
            self._authority.issue_client(account.name)
        await self._set_up([keys])
        self._instances[keys] = None

    @property
    def peer_port(self) -> int:
        """On which etcd's members would talk to each other."""
        return self._peer_port

    @property
    def pid(self) -> int:
        assert self._process is not None, "etcd was never started"
        return self._process.pid

    @property
    def log_path(self) -> Path:
        return self._data_dir / "etcd.log"

    @property
    def _data(self) -> Path:
        return self._data_dir / "data"

    async def start(
        self, *, timeout_s: float = 15.0, on_progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """Returns once etcd serves. Raises StoreUnavailable with etcd's last log line if it does
        not, OSError if the host cannot start it, and ConfigError if the binary is missing."""
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_certificates()
        on_progress("starting etcd")
        num_damaged = 0
        for attempt in range(_START_ATTEMPTS):
            # Another process may take a port before etcd binds it: then choose again.
            if not self._client_port:
                self._client_port, self._peer_port = free_ports(2)
            await self._spawn()
            try:
                await self._wait_until_healthy(timeout_s, on_progress)
                await self._set_up(self._instances)
            except StoreUnavailable as error:
                has_exited = self._has_exited
                await self.stop()
                if self._has_served and has_exited and self._is_damaged():
                    num_damaged += 1
                    if num_damaged > 1:  # it said so twice
                        self._set_data_aside(str(error))
                    continue
                is_taken = "address already in use" in str(error)
                if self._has_served or not is_taken or attempt == _START_ATTEMPTS - 1:
                    raise
                self._client_port = 0
            else:
                self._has_served = True
                on_progress(f"etcd serves at {self.endpoint}, for this host alone")
                return

        raise StoreUnavailable(f"etcd does not start; see {self.log_path}")

    async def wait(self) -> int:
        """Waits until the present process has ended, and returns its exit code."""
        assert self._process is not None, "etcd was never started"
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; idempotent."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, like a crash. `start` then continues with the same data."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()

    def kill_now(self) -> None:
        """SIGKILL, without waiting for its end. It does not start again."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _make_certificates(self) -> None:
        """At the first start."""
        if self._authority is not None:
            return
        self._authority = CertificateAuthority.load_or_create(self.credentials, self._clock)
        self._authority.issue_server([_HOST])
        certificate, key = self._authority.issue_client(ROOT)
        self._root = EtcdOptions(
            etcd_ca=self._authority.ca_path, etcd_cert=certificate, etcd_key=key
        )

    async def _set_up(self, instances: Iterable[Keys]) -> None:
        """etcd may have started with an empty data directory, and then knows nobody. Raises
        StoreUnavailable."""
        admin = EtcdAdmin(self.root)
        try:
            for keys in instances:
                await admin.set_up(accounts(keys), {})
            await admin.enable()
        except StoreUnavailable:
            raise
        except StoreError as error:
            raise StoreUnavailable(f"etcd does not take its users: {error}") from error
        finally:
            admin.close()

    async def _spawn(self) -> None:
        with contextlib.suppress(OSError):
            self._log_start = self.log_path.stat().st_size
        with open_log(self.log_path) as log:
            self._process = await asyncio.create_subprocess_exec(
                str(await etcd_binary()),
                *self._flags(),
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to its parent, which stops etcd last
            )
        if self._on_spawned is not None:
            await self._on_spawned()

    def _flags(self) -> list[str]:
        client = f"https://{self.endpoint}"
        peer = f"https://{_HOST}:{self._peer_port}"
        assert self._authority is not None, "certificates come first"
        ca, tls = str(self._authority.ca_path), self._authority.folder
        certificate, key = str(tls / f"{SERVER}.pem"), str(tls / f"{SERVER}.key")
        return [
            # Whoever has no certificate of ours is not even heard, on either port.
            *("--client-cert-auth", "--trusted-ca-file", ca),
            *("--cert-file", certificate, "--key-file", key),
            *("--peer-client-cert-auth", "--peer-trusted-ca-file", ca),
            *("--peer-cert-file", certificate, "--peer-key-file", key),
            "--enable-grpc-gateway=false",  # it would speak in the name of etcd's own certificate
            # Passwords, which nobody uses here, are random and long: to hash them slowly adds
            # nothing.
            *("--bcrypt-cost", "4", "--auth-token-ttl", str(self._token_ttl_s)),
            *("--name", "embedded", "--data-dir", str(self._data)),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"embedded={peer}"),
            # Only used if there are no data: then it is another cluster, and watchers see that.
            *("--initial-cluster-token", uuid.uuid4().hex),
            # Leases shorter than the election timeout are lengthened: allow 1 s.
            *("--heartbeat-interval", "50", "--election-timeout", "250"),
            *("--auto-compaction-mode", "revision"),
            *("--auto-compaction-retention", str(_COMPACT_AFTER_REVISIONS)),
            # This etcd runs on the host of all the ranks. A power cut could lose its data, but it
            # also ends the ranks. A stalled disk would delay lease renewals of healthy ranks. If
            # etcd is killed, nothing is lost, because the page cache outlives it.
            "--unsafe-no-fsync",
            *("--log-level", "warn", "--logger", "zap"),
        ]

    async def _wait_until_healthy(
        self, timeout_s: float, on_progress: Callable[[str], None]
    ) -> None:
        started_at = self._clock.now()
        store = EtcdStore(self.root, timeout_s=1.0)
        try:
            while True:
                if self._has_exited:
                    raise StoreUnavailable(f"etcd exited at start: {self._last_log_error()}")
                with contextlib.suppress(StoreUnavailable):
                    await store.check()
                    return
                waited_s = self._clock.now() - started_at
                if waited_s > timeout_s:
                    raise StoreUnavailable(
                        f"etcd did not serve within {timeout_s:.0f} s; see {self.log_path}"
                    )
                on_progress(f"waiting for etcd, {waited_s:.0f} s")
        finally:
            await store.close()

    @property
    def _has_exited(self) -> bool:
        return self._process is None or self._process.returncode is not None

    def _is_damaged(self) -> bool:
        free_bytes = shutil.disk_usage(self._data_dir).free
        return is_damaged("\n".join(self._log_lines()), free_bytes)

    def _set_data_aside(self, why: str) -> None:
        try:
            aside = set_aside(self._data)
        except OSError as error:
            raise StoreUnavailable(
                f"etcd's data in {self._data} are damaged and cannot be set aside "
                f"({error.strerror}): {why}"
            ) from error
        self._on_damaged(f"etcd's data are damaged ({why}); they lie in {aside} now")

    def _log_lines(self) -> list[str]:
        """What the present process has written."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode(errors="replace").splitlines()
        except OSError:
            return []

    def _last_log_error(self) -> str:
        lines = self._log_lines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("level") in ("fatal", "panic", "error"):
                    return str(entry.get("error") or entry.get("msg"))
        panics = [line for line in lines if line.startswith(("panic: ", "fatal error: "))]
        return [*lines, *panics][-1] if lines else "without a message"


@contextlib.asynccontextmanager
async def embedded_etcd(
    data_dir: Path, *, on_progress: Callable[[str], None] = lambda _: None
) -> AsyncIterator[EmbeddedEtcd]:
    """Runs an etcd while the body runs."""
    etcd = EmbeddedEtcd(data_dir)
    try:
        await etcd.start(on_progress=on_progress)
        yield etcd
    finally:
        await etcd.stop()
