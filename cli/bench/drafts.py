"""How good an instance's drafts were during a measurement: its ranks count them."""

from __future__ import annotations

from typing import NamedTuple

from cli.observe.read_view import read_view
from cli.run_dir import Target
from shared.rank_query import query_ranks


class Drafts(NamedTuple):
    """Of all ranks that answer, since their incarnations began."""

    verified: int = 0
    right: int = 0

    def since(self, before: Drafts) -> float | None:
        """The share of right ones; None if none was verified since."""
        verified = self.verified - before.verified
        return (self.right - before.right) / verified if verified > 0 else None


async def read_drafts(target: Target) -> Drafts:
    """Raises StoreError, ConfigError."""
    view = await read_view(target)
    replies = await query_ranks(view.ranks, target.access())
    found = [reply for reply in replies.values() if reply is not None]
    return Drafts(sum(r.tokens_drafted for r in found), sum(r.drafts_accepted for r in found))
