"""Knows which ranks are live and what they do, and chooses the rank for a session: the fittest
ranks come from here, and which of them from the routing policy. Pure, and as deterministic as the
policy is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gateway.prefix_memory import prefix_chain
from gateway.rank_load import RankLoad
from gateway.routing_policy import Candidate, PrefixAffinity, RoutingPolicy
from shared.stragglers import stragglers
from shared.types import Member, RankId
from shared.wire import Load

_PREFIX_AFFINITY = PrefixAffinity()  # has no state


class RankChooser:
    """A rank is live if the newest map names it and its link is open. A rank is silent if it does
    not answer a probe. It is still live, but gets sessions only if all live ranks are silent: the
    load of a hung rank does not grow, so by load alone it would be chosen. A rank that is drained
    is live, too, and gets sessions only if all others are drained or silent. Of ranks that are
    equal in all else, one that the others wait for gets none."""

    def __init__(self, policy: RoutingPolicy = _PREFIX_AFFINITY) -> None:
        self._policy = policy
        self._members: tuple[Member, ...] = ()
        self._draining: frozenset[Member] = frozenset()
        self._ranks: dict[Member, RankLoad] = {}
        self._late: Mapping[Member, float] | None = None  # None: not known since a rank changed

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members

    @property
    def draining(self) -> frozenset[Member]:
        return self._draining

    def live(self) -> list[Member]:
        return [m for m in self._members if m in self._ranks and self._ranks[m].linked]

    def answering(self, rank: RankId) -> Member | None:
        """The live member of this number, unless it is silent."""
        return next((m for m in self.live() if m.rank == rank and not self._ranks[m].silent), None)

    def load_of(self, member: Member) -> Load | None:
        """Its last report."""
        rank = self._ranks.get(member)
        return None if rank is None else rank.load

    def loads(self) -> list[Load]:
        """The last reports of the live ranks."""
        return [load for m in self.live() if (load := self._ranks[m].load) is not None]

    def on_map(self, members: Sequence[Member]) -> None:
        for left_out in set(self._members) - set(members):
            if left_out in self._ranks:
                self._ranks[left_out].served.clear()
        self._members = tuple(sorted(members))
        self._late = None

    def on_drains(self, draining: frozenset[Member]) -> None:
        """These are being drained now, and no others."""
        self._draining = draining

    def on_link_opened(self, member: Member, *, kv_block_tokens: int) -> None:
        self._ranks[member] = RankLoad(kv_block_tokens=kv_block_tokens, linked=True)
        self._late = None

    def on_link_broken(self, member: Member) -> None:
        """The caller must move the rank's sessions away before the link opens again."""
        if member in self._ranks:
            self._ranks[member].linked = False
            self._late = None

    def forget(self, member: Member) -> None:
        self._ranks.pop(member, None)
        self._late = None

    def on_silence(self, member: Member, *, silent: bool) -> None:
        if member in self._ranks:
            self._ranks[member].silent = silent

    def on_load(self, member: Member, load: Load) -> None:
        rank = self._ranks.get(member)
        if rank is not None:
            rank.on_report(load)
            self._late = None

    @property
    def kv_replicas_rejected(self) -> int:
        """On all ranks that are known now."""
        loads = (rank.load for rank in self._ranks.values())
        return sum(load.kv_replicas_rejected for load in loads if load is not None)

    def stragglers(self) -> Mapping[Member, float]:
        """The live ranks that hold the others up, with the ms by which they are late."""
        if self._late is None:
            self._late = self._stragglers()
        return self._late

    def _stragglers(self) -> dict[Member, float]:
        live = {member.rank: member for member in self.live()}
        loads = {
            rank: load for rank, m in live.items() if (load := self._ranks[m].load) is not None
        }
        return {live[rank]: late_ms for rank, late_ms in stragglers(loads).items()}

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
        """The policy's choice among the fittest live ranks; None if no rank is live. A rank with
        room for the tokens is fitter than one without, one that has not just refused the session
        (`avoid`) is fitter than one with room, one that is drained is less fit than these, and a
        silent rank is the least fit. `backup_rank`
        has KV replicas of these tokens. Only prefixes of the same `cache_salt` count as known: else
        the choice would tell one client what another has sent."""
        fittest: list[Member] = []
        late = self.stragglers()
        best = (True, True, True, True, True)
        for member in self.live():
            rank = self._ranks[member]
            fitness = (
                rank.silent,
                member in self._draining,
                member in avoid,
                rank.is_short_of_kv(len(tokens)),
                member in late,
            )
            if fitness < best or not fittest:
                best, fittest = fitness, [member]
            elif fitness == best:
                fittest.append(member)
        if not fittest:
            return None
        chains = _Chains(tokens, cache_salt) if self._policy.reads_prefixes else None
        chosen = self._policy.pick(
            [self._candidate(member, len(tokens), backup_rank, chains) for member in fittest]
        ).member
        if chains is not None:
            rank = self._ranks[chosen]
            rank.served.remember(chains.of(rank.kv_block_tokens))
        return chosen

    def _candidate(
        self, member: Member, num_tokens: int, backup_rank: RankId | None, chains: _Chains | None
    ) -> Candidate:
        rank = self._ranks[member]
        size = rank.kv_block_tokens
        num_usable = max(0, num_tokens - 1) // size  # the last token is always computed
        is_backup = member.rank == backup_rank
        num_spared = num_usable if is_backup else 0
        if chains is not None and not is_backup:
            num_spared = rank.served.num_known(chains.of(size)[:num_usable])
        return Candidate(
            member=member,
            work_tokens=rank.weight(),
            spared_tokens=num_spared * size,
            is_backup=is_backup,
        )


class _Chains:
    """The prefix chains of one prompt, each made once, and only if it is asked for."""

    def __init__(self, tokens: Sequence[int], cache_salt: bytes) -> None:
        self._tokens = tokens
        self._cache_salt = cache_salt
        self._chains: dict[int, tuple[int, ...]] = {}

    def of(self, block_tokens: int) -> tuple[int, ...]:
        if block_tokens not in self._chains:
            salt = self._cache_salt
            self._chains[block_tokens] = prefix_chain(self._tokens, block_tokens, cache_salt=salt)
        return self._chains[block_tokens]
