"""What two ranks must have in common to use each other's blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockForm:
    """`layout` and `block_bytes` as `ports.BlockCache` gives them."""

    layout: str
    block_bytes: int
