"""Keeps the logs of a run small. Their writers never learn of it: they append, so a file that was
copied and emptied under them goes on from its start. Lines written in between are lost."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

_PATTERN = "*.log"
_EVERY_S = 20.0


async def keep_logs_small(folders: Sequence[Path], bytes_max: int) -> None:
    """Until cancelled. `bytes_max` 0: nothing is ever cut."""
    while bytes_max:
        await asyncio.sleep(_EVERY_S)
        await asyncio.to_thread(rotate_logs, folders, bytes_max)


def rotate_logs(folders: Sequence[Path], bytes_max: int) -> None:
    """Every log that is larger than `bytes_max` becomes NAME.log.1, in place of an older one, and
    begins anew. If the disk has no room for that, it begins anew all the same."""
    for folder in folders:
        for log in sorted(folder.glob(_PATTERN)):
            with contextlib.suppress(OSError):
                if log.stat().st_size > bytes_max:
                    _rotate(log)


def _rotate(log: Path) -> None:
    """Raises OSError if it cannot be emptied."""
    older = log.with_name(f"{log.name}.1")
    try:
        shutil.copyfile(log, older)
    except OSError:
        with contextlib.suppress(OSError):
            older.unlink(missing_ok=True)
    with log.open("r+b") as file:
        file.truncate(0)
