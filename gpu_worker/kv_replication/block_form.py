"""What two ranks must have in common to load each other's KV blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockForm:
    """`layout` and `block_bytes` are those of `engine.kv_replication.BlockCache`."""

    layout: str
    block_bytes: int
