"""The data folder of the embedded etcd: whether etcd's last words mean that it is damaged, and how
it is set aside. Everything in it can be told again by those who wrote it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOM_BYTES_MIN = 16 << 20
"""With less free space, whatever etcd says may come from the full disk."""

_FROM_OUTSIDE = re.compile(
    r"no space left|quota exceeded|address already in use|permission denied|read-only file system"
    r"|cannot allocate memory|out of memory|too many open files|resource temporarily unavailable"
)
_DAMAGE = re.compile(
    r"crc mismatch|max entry size limit exceeded|unexpected eof|slice bounds|invalid database"
    r"|version mismatch|checksum error|file size too small|unmarshal|snap: |wal: |walpb: |bbolt"
    r"|freelist|page \d+|^panic: |fatal error: ",
    re.MULTILINE,
)


def is_damaged(last_words: str, free_bytes: int) -> bool:
    """Whether an etcd that has served before, and has now exited at its start with these
    `last_words` in its log, will never start from its data again."""
    said = last_words.lower()
    if free_bytes < ROOM_BYTES_MIN or _FROM_OUTSIDE.search(said):
        return False
    return bool(_DAMAGE.search(said))


def set_aside(data: Path) -> Path:
    """Where it lies now; what was set aside before is deleted. Raises OSError."""
    aside = data.with_name(f"{data.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return data.rename(aside)
