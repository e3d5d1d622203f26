"""What a gateway knows of one rank's load: its own sessions there, the rank's last report, and the
prefixes that it has sent there."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.prefix_memory import PrefixMemory
from shared.wire import Load

SESSION_TOKENS = 128
"""The weight of a session in addition to its tokens: a decoding sequence is part of every step."""

PREFIX_BLOCKS_MAX = 65536
"""The most blocks that are remembered per rank, however large its cache is."""


@dataclass(slots=True)
class RankLoad:
    """A rank with a link that is or was open. `own_*` count this gateway's sessions there;
    `known_*` are the same counts at the rank's last report, which includes them."""

    kv_block_tokens: int
    served: PrefixMemory = field(default_factory=lambda: PrefixMemory(PREFIX_BLOCKS_MAX))
    linked: bool = False
    silent: bool = False
    load: Load | None = None
    own_sessions: int = 0
    own_tokens: int = 0
    known_sessions: int = 0
    known_tokens: int = 0

    def weight(self) -> int:
        """Work on the rank, in tokens: this gateway's as of now, others' as of the last report."""
        tokens, sessions = self.own_tokens, self.own_sessions
        if self.load is not None:
            tokens += max(0, self.load.tokens - self.known_tokens)
            sessions += max(0, self.load.running + self.load.waiting - self.known_sessions)
        return tokens + SESSION_TOKENS * sessions

    def is_short_of_kv(self, num_tokens: int) -> bool:
        """Whether a prompt would have to wait until other sessions free KV blocks."""
        if self.load is None:
            return False
        return self.load.kv_blocks_free * self.kv_block_tokens < num_tokens

    def on_report(self, load: Load) -> None:
        self.load = load
        self.known_sessions, self.known_tokens = self.own_sessions, self.own_tokens
        self.served.resize(min(load.kv_blocks, PREFIX_BLOCKS_MAX))
        if load.prefix_tokens and not load.kv_blocks_cached:  # its cache is off, or lost
            self.served.clear()
