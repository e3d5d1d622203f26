"""The memory of the expert cache that a node's ranks share. It comes from ranks that an earlier
agent left running, or is new. The agent holds it, so that it outlives every rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import structlog

from node_agent.rank_process import RankCommand, command_line_of, find_running
from shared.expert_cache_memory import create_memory, expert_cache_bytes, open_memory_of_process
from shared.free_memory import free_bytes
from shared.types import DeviceKind

log = structlog.get_logger()

_FLAG = "--host-experts-fd"


def with_expert_cache(command: RankCommand, host_experts_gb: float) -> RankCommand:
    """The command with the memory's file descriptor. Unchanged if there is to be no cache, or if
    the host has no memory for it."""
    if host_experts_gb == 0 or _is_for_cpu(command.extra_flags, os.environ):
        return command
    try:
        fd = _adopted_memory(command)
        if fd is None:
            fd = create_memory(expert_cache_bytes(host_experts_gb, free_bytes()))
    except OSError as error:
        log.warning("no_host_experts", detail=str(error))
        return command
    log.info("host_experts_memory", gb=round(os.fstat(fd).st_size / 1e9, 2))
    return replace(command, host_experts_fd=fd)


def _adopted_memory(command: RankCommand) -> int | None:
    found: int | None = None
    for running_rank, process in find_running(command):
        argv = command_line_of(running_rank.pid)
        flags = dict(pairwise(argv))
        if found is None and _FLAG in flags:
            with suppress(ValueError, OSError):  # the process has exited
                found = open_memory_of_process(running_rank.pid, int(flags[_FLAG]))
        process.close()
    return found


def _is_for_cpu(rank_flags: Sequence[str], environ: Mapping[str, str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default=environ.get("STARFISH_RANK_DEVICE"))
    known, _ = parser.parse_known_args(list(rank_flags))
    return bool(known.device == DeviceKind.CPU.value)
