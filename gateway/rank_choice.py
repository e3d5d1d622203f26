"""Which rank takes a session: what this gateway knows of each rank's load, and the choice. Pure,
and deterministic given what it was told."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shared.types import Member
from shared.wire import Load

SESSION_TOKENS = 128
"""What one session weighs beside its tokens: every decoding sequence takes part in every step."""

PREFIX_TOKENS = 64
AFFINITY_SLACK_TOKENS = 64
AFFINITIES_MAX = 4096


@dataclass(slots=True)
class _Rank:
    """A rank to which a link is, or was, open. `own_*` count this gateway's sessions there;
    `known_*` are what they were when the rank last reported, as part of its report."""

    kv_block_tokens: int
    linked: bool = False
    silent: bool = False
    load: Load | None = None
    own_sessions: int = 0
    own_tokens: int = 0
    known_sessions: int = 0
    known_tokens: int = 0

    def weight(self) -> int:
        """Tokens in work there: ours as of now, others' as of the last report."""
        tokens, sessions = self.own_tokens, self.own_sessions
        if self.load is not None:
            tokens += max(0, self.load.tokens - self.known_tokens)
            sessions += max(0, self.load.running + self.load.waiting - self.known_sessions)
        return tokens + SESSION_TOKENS * sessions

    def short_of_kv(self, num_tokens: int) -> bool:
        """Whether a prompt would have to wait there until others end."""
        if self.load is None:
            return False
        return self.load.kv_blocks_free * self.kv_block_tokens < num_tokens


class RankBoard:
    """A rank is live when the newest map names it and its link is open. `silent` ones (their probe
    stays unanswered) are still live, but get work only when all are silent: a hung rank finishes
    nothing, so by its load alone it would look attractive."""

    def __init__(self) -> None:
        self._members: tuple[Member, ...] = ()
        self._ranks: dict[Member, _Rank] = {}
        self._served_by: OrderedDict[int, Member] = OrderedDict()

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members

    def live(self) -> list[Member]:
        return [m for m in self._members if m in self._ranks and self._ranks[m].linked]

    def on_map(self, members: Sequence[Member]) -> None:
        self._members = tuple(sorted(members))

    def on_link_opened(self, member: Member, *, kv_block_tokens: int) -> None:
        self._ranks[member] = _Rank(kv_block_tokens=kv_block_tokens, linked=True)

    def on_link_broken(self, member: Member) -> None:
        """What is placed there must be taken off before the link opens again."""
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

    def add(self, member: Member, *, sessions: int = 0, tokens: int = 0) -> None:
        """A session came (+1, its tokens), grew, or left (-1, minus its tokens)."""
        rank = self._ranks.get(member)
        if rank is not None:
            rank.own_sessions += sessions
            rank.own_tokens += tokens

    def choose(self, prompt: Sequence[int], *, avoid: Collection[Member] = ()) -> Member | None:
        """The live rank with the least work, or None without any. `avoid` refused it just now, and
        comes last but for silent ones."""
        num_tokens = len(prompt)
        ranked = [(self._key(m, num_tokens, avoid), m) for m in self.live()]
        if not ranked:
            return None
        best_key, best = min(ranked)
        prefix = hash(tuple(prompt[:PREFIX_TOKENS]))
        affine = self._served_by.pop(prefix, None)
        for key, member in ranked:
            # Only a tie-breaker: it never outweighs a difference that a client could feel.
            if (
                member == affine
                and key[:3] == best_key[:3]
                and key[3] <= best_key[3] + AFFINITY_SLACK_TOKENS
            ):
                best = member
        self._served_by[prefix] = best
        if len(self._served_by) > AFFINITIES_MAX:
            self._served_by.popitem(last=False)
        return best

    def _key(
        self, member: Member, num_tokens: int, avoid: Collection[Member]
    ) -> tuple[bool, bool, bool, int]:
        rank = self._ranks[member]
        return (rank.silent, member in avoid, rank.short_of_kv(num_tokens), rank.weight())
