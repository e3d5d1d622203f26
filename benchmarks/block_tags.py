"""What the tag of a KV replica costs, against other keyed hashes: `python -m
benchmarks.block_tags`."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

import numpy as np

from gpu_worker.kv_replication.block_tags import BlockTags
from shared.handshake import Access

SIZES = (130 << 10, 1536 << 10)  # a block of the reference model, and one of Qwen3-30B-A3B's
SECONDS = 0.5
KEY = bytes(32)


def rate_of(work: Callable[[], object], nbytes: int) -> float:
    """GB/s, of the fastest tenth of a second."""
    best, until = 0.0, time.perf_counter() + SECONDS
    while (began := time.perf_counter()) < until:
        count = 0
        while (took := time.perf_counter() - began) < SECONDS / 5:
            work()
            count += 1
        best = max(best, count * nbytes / took / 1e9)
    return best


def rates(tags: BlockTags, nbytes: int) -> dict[str, float]:
    content = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    works: dict[str, Callable[[], object]] = {
        "GMAC, as used": lambda: tags.tag(b"name", content),
        "HMAC-SHA256": lambda: hmac.digest(KEY, content.data, "sha256"),
        "keyed BLAKE2b": lambda: hashlib.blake2b(content.data, key=KEY).digest(),
    }
    return {name: rate_of(work, nbytes) for name, work in works.items()}


def main() -> None:
    tags = BlockTags(Access("bench", KEY))
    for nbytes in SIZES:
        for name, rate in rates(tags, nbytes).items():
            print(f"{nbytes >> 10:5} KiB  {name:14} {rate:6.2f} GB/s")


if __name__ == "__main__":
    main()
