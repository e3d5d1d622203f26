"""Which releases the processes of an instance are, for `starfish status`."""

from __future__ import annotations

from collections.abc import Iterator

from cli.observe.instance_view import InstanceView
from shared.release import Release


def releases_of(view: InstanceView) -> dict[str, list[str]]:
    """By release, as people read it: the processes that are of it. Oldest protocol first."""
    found: dict[Release, list[str]] = {}
    for name, release in _processes(view):
        found.setdefault(release, []).append(name)
    ordered = sorted(found, key=lambda release: (release.protocol, release.version))
    return {str(release): found[release] for release in ordered}


def _processes(view: InstanceView) -> Iterator[tuple[str, Release]]:
    """Of several control planes the leading one alone has a record."""
    if view.leader is not None:
        yield f"control plane {view.leader.control_plane}", view.leader.release
    for gateway in view.gateways:
        yield f"gateway {gateway.gateway}", gateway.release
    for agent in view.agents:
        yield f"agent {agent.node}", agent.release
    for rank in sorted(view.ranks, key=lambda record: record.member):
        yield f"rank {rank.rank}", rank.release
