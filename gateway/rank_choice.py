"""Chooses the rank for a session, by each rank's load and the prefixes that it has served. Pure and
deterministic."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from gateway.prefix_memory import PrefixMemory, prefix_chain
from shared.types import Member, RankId
from shared.wire import Load

SESSION_TOKENS = 128
"""The weight of a session in addition to its tokens: a decoding sequence is part of every step."""

CACHED_TOKEN_WEIGHT = 2
"""How many more tokens of work a rank may have than another, per prompt token that it has cached.
More than one, because most of a rank's tokens only occupy its KV cache while others are computed.
Not much more, so that a prefix that every client uses is soon computed on a second rank and a third
one too, and does not overload the first."""

PREFIX_BLOCKS_MAX = 65536
"""The most blocks that are remembered per rank, however large its cache is."""


@dataclass(slots=True)
class _Rank:
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


class RankChooser:
    """A rank is live if the newest map names it and its link is open. A rank is silent if it does
    not answer a probe. It is still live, but gets sessions only if all live ranks are silent: the
    load of a hung rank does not grow, so by load alone it would be chosen."""

    def __init__(self) -> None:
        self._members: tuple[Member, ...] = ()
        self._ranks: dict[Member, _Rank] = {}

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members

    def live(self) -> list[Member]:
        return [m for m in self._members if m in self._ranks and self._ranks[m].linked]

    def loads(self) -> list[Load]:
        """The last reports of the live ranks."""
        return [load for m in self.live() if (load := self._ranks[m].load) is not None]

    def on_map(self, members: Sequence[Member]) -> None:
        for left_out in set(self._members) - set(members):
            if left_out in self._ranks:
                self._ranks[left_out].served.clear()
        self._members = tuple(sorted(members))

    def on_link_opened(self, member: Member, *, kv_block_tokens: int) -> None:
        self._ranks[member] = _Rank(kv_block_tokens=kv_block_tokens, linked=True)

    def on_link_broken(self, member: Member) -> None:
        """The caller must move the rank's sessions away before the link opens again."""
        if member in self._ranks:
            self._ranks[member].linked = False

    def forget(self, member: Member) -> None:
        self._ranks.pop(member, None)

    def on_silence(self, member: Member, *, silent: bool) -> None:
        if member in self._ranks:
            self._ranks[member].silent = silent

    def on_load(self, member: Member, load: Load) -> None:
        rank = self._ranks.get(member)
        if rank is not None:
            rank.load = load
            rank.known_sessions, rank.known_tokens = rank.own_sessions, rank.own_tokens
            rank.served.resize(min(load.kv_blocks, PREFIX_BLOCKS_MAX))
            if load.prefix_tokens and not load.kv_blocks_cached:  # its cache is off, or lost
                rank.served.clear()

    @property
    def kv_replicas_rejected(self) -> int:
        """On all ranks that are known now."""
        loads = (rank.load for rank in self._ranks.values())
        return sum(load.kv_replicas_rejected for load in loads if load is not None)

    def add(self, member: Member, *, sessions: int = 0, tokens: int = 0) -> None:
        """A session was placed (+1, its tokens), grew, or left (-1, minus its tokens)."""
        rank = self._ranks.get(member)
        if rank is not None:
            rank.own_sessions += sessions
            rank.own_tokens += tokens

    def choose(
        self,
        tokens: Sequence[int],
        *,
        avoid: Collection[Member] = (),
        backup_rank: RankId | None = None,
        cache_salt: bytes = b"",
    ) -> Member | None:
        """The live rank with the least work after subtracting what its prefix cache saves; None if
        no rank is live. Ranks in `avoid` have just refused the session; only silent ones are worse.
        `backup_rank` has KV replicas of these tokens, which save as much as its own blocks. Only
        prefixes of the same `cache_salt` count: else the choice would tell one client what another
        has sent."""
        chains: dict[int, tuple[int, ...]] = {}
        ranked = []
        for member in self.live():
            rank = self._ranks[member]
            size = rank.kv_block_tokens
            if size not in chains:
                chains[size] = prefix_chain(tokens, size, cache_salt=cache_salt)
            usable = chains[size][
                : max(0, len(tokens) - 1) // size
            ]  # the last token is always computed
            kept = member.rank == backup_rank
            num_spared = len(usable) if kept else rank.served.num_known(usable)
            cost = rank.weight() - CACHED_TOKEN_WEIGHT * num_spared * size
            no_room = rank.is_short_of_kv(len(tokens))
            ranked.append(((rank.silent, member in avoid, no_room, cost), member))
        if not ranked:
            return None
        _, best = min(ranked)
        rank = self._ranks[best]
        rank.served.remember(chains[rank.kv_block_tokens])
        return best
