"""The ranks that a flag such as `0-3,6` names; none if it is empty."""

from __future__ import annotations

from shared.errors import ConfigError
from shared.types import RankId


def parse_ranks(text: str) -> tuple[RankId, ...]:
    """Returns each rank once, sorted. Raises ConfigError."""
    ranks: set[int] = set()
    if not text.strip():
        return ()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise ConfigError(f"--ranks {text!r}: pass a list such as 0-3 or 0,2,5") from None
        if not 0 <= low <= high:
            raise ConfigError(f"--ranks {text!r}: {part.strip()!r} is not a range of ranks")
        ranks.update(range(low, high + 1))
    return tuple(RankId(rank) for rank in sorted(ranks))
