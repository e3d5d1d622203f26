"""What etcd says of itself, and what it means for an instance."""

from __future__ import annotations

from dataclasses import dataclass

ALARM_KINDS = ("NOSPACE", "CORRUPT")
_MEANING = {
    "NOSPACE": "etcd's space is used up and it takes no writes: serving goes on, but no death is "
    "recovered from and nothing joins until it is compacted, defragmented and disarmed",
    "CORRUPT": "etcd's members hold different data and take no writes: serving goes on, but no "
    "death is recovered from and nothing joins until the damaged member is replaced",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdHealth:
    """`alarms`: the kinds that any member has raised, sorted. `size_bytes`: the database file of
    the member that answered, compacted revisions included."""

    alarms: tuple[str, ...]
    version: str
    size_bytes: int


def describe_alarm(kind: str) -> str:
    """A sentence for people."""
    return _MEANING.get(kind, f"etcd has raised the alarm {kind}")
