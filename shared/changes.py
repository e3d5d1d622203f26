"""What changes under a prefix of etcd, as events alone: a watch's snapshots are compared with what
is known, so that no consumer has to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from shared.revisions import Revisions
from shared.store import Snapshot, Store, WatchEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What became known at once, in ascending order of revisions. `synced` says that etcd was just
    read whole: with these events everything is known that it held. `events` may then be empty."""

    events: tuple[WatchEvent, ...]
    synced: bool = False


async def changes(store: Store, prefix: str) -> AsyncGenerator[Changes, None]:
    """Follows the prefix. The first item is what etcd holds, and is `synced`. Ends as
    `Store.watch` does."""
    revisions = Revisions()
    async with contextlib.aclosing(store.watch(prefix)) as watch:
        async for item in watch:
            news, synced = tuple(revisions.admit(item)), isinstance(item, Snapshot)
            if news or synced:
                yield Changes(events=news, synced=synced)
