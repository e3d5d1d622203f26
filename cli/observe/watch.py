"""`starfish watch`: follows etcd live until interrupted."""

from __future__ import annotations

import json
import sys
from datetime import datetime

from cli.observe.event_formatter import EventFormatter, EventLine
from cli.run_dir import Target
from shared.changes import changes
from shared.clock import Clock
from shared.etcd_store import connect_store
from shared.keys import Keys


async def watch_instance(target: Target, *, as_json: bool, clock: Clock) -> int:
    """Raises StoreUnavailable if etcd does not answer at the start. If it stops answering later,
    the watch waits and then shows what it missed."""
    keys = Keys(target.instance)
    formatter = EventFormatter(keys)
    store = await connect_store(target.store)
    try:
        async for seen in changes(store, keys.root):
            for line in formatter.lines(seen.events):
                try:
                    print(_format(line, clock.wall(), as_json), flush=True)
                except BrokenPipeError:  # `starfish watch | head`
                    sys.stderr.close()
                    return 0
    finally:
        await store.close()
    return 0


def _format(line: EventLine, wall_s: float, as_json: bool) -> str:
    if as_json:
        return json.dumps({"time": round(wall_s, 6), "kind": line.kind, **line.fields})
    time = datetime.fromtimestamp(wall_s).strftime("%H:%M:%S.%f")[:-3]
    return f"{time}  {line.text}"
