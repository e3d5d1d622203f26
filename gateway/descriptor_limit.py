"""How many connections this process has file descriptors for."""

from __future__ import annotations

import resource

import structlog

log = structlog.get_logger()

_OWN_DESCRIPTORS = 256
"""For all but clients: ranks, etcd, files."""


def allowed_connections(wanted: int) -> int:
    """Raises this process's limit on file descriptors as far as `wanted` connections need and the
    system lets it, and returns how many of them have a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OWN_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    allowed = max(1, min(wanted, needed - _OWN_DESCRIPTORS))
    if allowed < wanted:
        log.warning("connections_limited", wanted=wanted, allowed=allowed, descriptors=hard)
    return allowed
