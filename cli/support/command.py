"""Gathers a bundle from a running instance, or from what is left of one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from cli.client_headers import client_headers
from cli.observe.instance_view import InstanceView, decode_value
from cli.observe.status import read_status
from cli.run_dir import Target, read_state
from cli.support.bundle import Bundle, open_bundle
from cli.support.host_facts import host_files, processes_of, versions
from cli.support.redaction import Redactor, known_secrets
from shared.clock import SystemClock
from shared.errors import StarfishError
from shared.etcd_store import connect_store
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import RankRecord
from shared.store import KeyValue

HTTP_TIMEOUT_S = 5.0
LOG_BYTES_MAX = 2 << 20
"""Of each log, its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSources:
    """`run_dir`: where `starfish up` keeps its logs, if it runs the instance here. `log_dirs` and
    `metrics_urls` are further ones."""

    target: Target
    run_dir: Path | None
    log_dirs: Sequence[Path]
    metrics_urls: Sequence[str]


async def write_bundle(path: Path, sources: BundleSources, environ: Mapping[str, str]) -> list[str]:
    """The names of what could not be had. Raises ConfigError if `path` cannot be written."""
    target = sources.target
    with open_bundle(path, Redactor(_secrets(sources, environ))) as bundle:
        bundle.add_json("versions.json", versions())
        for name, content in await asyncio.to_thread(lambda: list(host_files())):
            bundle.add(name, content)
        bundle.try_add("processes.json", lambda: processes_of(target.instance))
        _add_logs(bundle, sources)
        view = await _add_etcd(bundle, target)
        await _add_status(bundle, target)
        await _add_metrics(bundle, _metrics_urls(sources, view), environ)
        return bundle.missing


def bundle_path(instance: str) -> Path:
    """Where a bundle goes that nobody has named."""
    when = time.strftime("%Y%m%d-%H%M%S")
    return Path(f"starfish-support-{instance}-{when}.tar.gz")


def _secrets(sources: BundleSources, environ: Mapping[str, str]) -> Iterable[bytes]:
    store = sources.target.store
    files = [sources.target.secret_file, store.etcd_key, store.etcd_password_file]
    folders = [] if sources.run_dir is None else [sources.run_dir]
    return known_secrets(environ, [path for path in files if path is not None], folders)


def _add_logs(bundle: Bundle, sources: BundleSources) -> None:
    folders = list(sources.log_dirs)
    if sources.run_dir is not None:
        folders += [sources.run_dir / "logs", sources.run_dir / "etcd"]
        bundle.try_add("run.json", lambda: msgspec.to_builtins(read_state(sources.run_dir)))  # type: ignore[arg-type]
    for folder in folders:
        for path in sorted(folder.glob("*.log")):
            name = f"logs/{path.name}"
            try:
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - LOG_BYTES_MAX))
                    bundle.add(name, file.read())
            except OSError as error:
                bundle.add_missing(name, error)


async def _add_etcd(bundle: Bundle, target: Target) -> InstanceView:
    """Every key of the instance. A value that is no record of ours is told by its size alone."""
    keys = Keys(target.instance)
    try:
        store = await connect_store(target.store)
        try:
            values = (await store.get_prefix(keys.root)).values
        finally:
            await store.close()
    except StarfishError as error:
        bundle.add_missing("etcd.json", error)
        return InstanceView()
    bundle.add_json("etcd.json", {value.key: _shown(keys, value) for value in values})
    return InstanceView.of(keys, values)


def _shown(keys: Keys, kv: KeyValue) -> object:
    record = decode_value(keys, kv.key, kv.value)
    if record is None:
        return {"bytes": len(kv.value)}
    if isinstance(record, ExpertMap):
        return record.to_wire()
    plain = msgspec.to_builtins(record, enc_hook=str)
    if isinstance(record, RankRecord):
        plain["exchange_handles"] = record.exchange_handles is not None  # they open its memory
    return plain


async def _add_status(bundle: Bundle, target: Target) -> None:
    try:
        bundle.add_json("status.json", await read_status(target, SystemClock()))
    except StarfishError as error:
        bundle.add_missing("status.json", error)


def _metrics_urls(sources: BundleSources, view: InstanceView) -> dict[str, str]:
    """By the name of the process."""
    urls = {gateway.gateway: gateway.own_url for gateway in view.gateways}
    for agent in view.agents:
        if agent.metrics_port:
            urls[f"agent-{agent.node}"] = f"http://{agent.host}:{agent.metrics_port}"
    state = None if sources.run_dir is None else read_state(sources.run_dir)
    for number, port in enumerate(state.metrics_ports[:-1] if state else ()):
        urls[f"control-plane-{number}"] = f"http://127.0.0.1:{port}"
    return urls | {url.partition("://")[2]: url for url in sources.metrics_urls}


async def _add_metrics(bundle: Bundle, urls: Mapping[str, str], environ: Mapping[str, str]) -> None:
    timeout = aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        for process, url in urls.items():
            known_to = environ if process.startswith("gateway") else {}
            await _add_page(bundle, http, f"metrics/{process}.txt", url + "/metrics", known_to)
            if not process.startswith("agent"):
                await _add_page(bundle, http, f"health/{process}.json", url + "/health", {})


async def _add_page(
    bundle: Bundle,
    http: aiohttp.ClientSession,
    name: str,
    url: str,
    environ: Mapping[str, str],
) -> None:
    """A page of a service, asked for with the API key of `environ`, if there is one."""
    try:
        async with http.get(url, headers=client_headers(environ)) as response:
            content = await response.read()
            if response.status in (200, 503):  # the latter of one that is not ready
                bundle.add(name, content)
            else:
                bundle.add_missing(name, f"status {response.status}")
    except (aiohttp.ClientError, TimeoutError) as error:
        bundle.add_missing(name, error)


def run_folder_of(run_dir: Path, target: Target) -> Path | None:
    """`run_dir`, if `starfish up` runs this instance from it."""
    state = read_state(run_dir) if run_dir.is_dir() else None
    return run_dir if state is not None and state.instance == target.instance else None
