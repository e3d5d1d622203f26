"""Sites on this host: an instance of `starfish up` that was started for the measurement, or one
that runs already."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console

from cli.bench.chaos.private_disk import private_disk
from cli.bench.chaos.site import Site
from cli.bench.fault_observer import FaultObserver
from cli.bench.temporary_instance import temporary_instance_with_progress
from cli.bench.temporary_options import TemporaryInstanceOptions
from cli.run_dir import Target
from shared.errors import ConfigError
from shared.etcd_store import connect_store
from shared.keys import Keys
from shared.records import OwnerRecord, unpack_record

_GATEWAYS = 2


@asynccontextmanager
async def own_site(
    options: TemporaryInstanceOptions,
    console: Console,
    keep_logs: Path | None,
    flags: Sequence[str] = (),
) -> AsyncIterator[Site]:
    """`flags` are more of `starfish up`. Raises Unavailable if it does not start."""
    flags = ("--gateways", str(_GATEWAYS), *flags)
    with private_disk() as disk:
        async with (
            temporary_instance_with_progress(
                options, console, "instance", flags=flags, parent=disk, keep_logs=keep_logs
            ) as target,
            running_site(target) as site,
        ):
            site.folder = disk
            yield site


@asynccontextmanager
async def running_site(target: Target) -> AsyncIterator[Site]:
    """Raises StoreUnavailable, and ConfigError if no `starfish up` runs the instance."""
    if target.url is None:
        raise ConfigError("which gateway? pass --url, --run-dir or --own")
    owner = await _owner_of(target)
    async with FaultObserver.watching(target) as observer:
        site = Site(
            urls=(target.url,),
            mark=owner.run,
            owner=owner.pid,
            observer=observer,
            run_dir=None if target.secret_file is None else target.secret_file.parent,
        )
        try:
            yield site
        finally:
            site.continue_all()


async def _owner_of(target: Target) -> OwnerRecord:
    store = await connect_store(target.store)
    try:
        found = await store.get(Keys(target.instance).owner)
    finally:
        await store.close()
    if found is None:
        raise ConfigError(
            f"instance {target.instance!r} is not run by `starfish up`, so its processes cannot be "
            "told from others'; use --own"
        )
    return unpack_record(found.value, OwnerRecord)
