"""Who takes part in an exchange: the incarnations that this rank has met, those whose buffers are
mapped, the members of the adopted map, and those that a newer epoch has given up. Decides; touches
no device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.expert_map import ExpertMap
from shared.types import Epoch, Incarnation, Member, RankId


class MaskChange(NamedTuple):
    """What the device's mask must become, and which of its bits differ from before."""

    active: frozenset[RankId]
    mask: tuple[RankId, ...]
    unmask: tuple[RankId, ...]


class EpMembers:
    """Not thread-safe: `RankMask` locks around it."""

    def __init__(self, own: Member) -> None:
        self._own = own
        self._met: dict[RankId, Incarnation] = {}
        self._mapped: dict[RankId, Incarnation] = {}
        self._given_up: dict[RankId, Epoch] = {}
        self._active: frozenset[RankId] = frozenset()
        self._has_ended = False
        self.members: frozenset[Member] = frozenset({own})
        self.epoch = Epoch(0)

    def end(self) -> list[RankId]:
        """This incarnation is over: from now on it waits for nobody, whatever the engine still
        does. Returns the ranks that kernels may wait for now."""
        self._has_ended = True
        return sorted(self._active)

    def renewed(self, own: Member) -> EpMembers:
        """For the next incarnation of this process: it has met nobody. What is mapped stays so."""
        assert self._has_ended, "an incarnation that may still map and wait"
        renewed = EpMembers(own)
        renewed._mapped = dict(self._mapped)
        return renewed

    def may_map(self, rank: RankId) -> bool:
        """Whether a new incarnation of this rank may be mapped beside running steps. It may not if
        a former one has to be unmapped under an adopted map. Raises ConnectionError if that map
        names an incarnation of this rank that has not been given up. One that was given up must
        not block its successor: the map without it may need the successor's slots."""
        if self._has_ended:
            raise ConnectionError(f"incarnation {self._own} is over")
        if any(m.rank == rank for m in self.members):
            if rank not in self._given_up_ranks(self.epoch):
                raise ConnectionError(f"rank {rank} is a member of the adopted map")
            return False
        return not self.epoch or rank not in self._mapped

    def mark_connected(self, peer: Member) -> None:
        """From now on a map may name this incarnation."""
        self._met[peer.rank] = peer.incarnation

    def is_connected(self, member: Member) -> bool:
        return self._met.get(member.rank) == member.incarnation

    def members_to_map(self, expert_map: ExpertMap) -> list[Member]:
        """Members met, not given up, and not mapped yet."""
        gone = self._given_up_ranks(expert_map.epoch)
        return [
            m
            for m in expert_map.members
            if self.is_connected(m)
            and m.rank not in gone
            and self._mapped.get(m.rank) != m.incarnation
        ]

    def mapped(self, ranks: Collection[RankId]) -> list[RankId]:
        """Those of them that have a mapped buffer, of whichever incarnation."""
        return sorted(rank for rank in ranks if rank in self._mapped)

    def note_mapped(self, member: Member) -> None:
        self._mapped[member.rank] = member.incarnation

    def note_unmapped(self, ranks: Collection[RankId]) -> None:
        for rank in ranks:
            del self._mapped[rank]

    def mark_unmappable(self, member: Member) -> None:
        """Its buffer cannot be mapped: it stays masked, and is not met any more."""
        if self.is_connected(member):
            del self._met[member.rank]

    def give_up(self, dead: Collection[Member], epoch: Epoch) -> list[RankId]:
        """Map `epoch` is without these members. Returns the ranks that kernels need not wait for
        any more. One not met, or one whose successor was met already, is none of them. Nobody is,
        if that map or a newer one is adopted by now: it may name them as joiners."""
        if epoch <= self.epoch or self._has_ended:
            return []
        met = sorted(m.rank for m in dead if self.is_connected(m))
        unmappable = (m.rank for m in dead if m in self.members)
        for rank in (*met, *unmappable):
            self._given_up[rank] = max(epoch, self._given_up.get(rank, epoch))
        return met

    def delivers_no_more(self) -> bool:
        """Whether no step of the adopted map that has not ended by now can be delivered: a member
        has been given up."""
        gone = self._given_up_ranks(self.epoch)
        return any(m.rank in gone for m in self.members)

    def adopt(self, expert_map: ExpertMap) -> MaskChange:
        """A member that a newer map than this one has given up stays masked, and so does one that
        is not mapped. Then the next step is abandoned at once and does not wait for the dead."""
        assert expert_map.has(self._own), f"{self._own} is no member of the map"
        peers = {m.rank for m in expert_map.members if self._mapped.get(m.rank) == m.incarnation}
        active = frozenset(peers - self._given_up_ranks(expert_map.epoch))
        if self._has_ended:
            active = frozenset()
        change = MaskChange(
            active | {self._own.rank},
            tuple(sorted(self._active - active)),
            tuple(sorted(active - self._active)),
        )
        self._active = active
        self.members = frozenset(expert_map.members)
        self.epoch = expert_map.epoch
        return change

    def isolate(self) -> MaskChange:
        """Kernels shall wait for nobody, and send to nobody."""
        change = MaskChange(frozenset({self._own.rank}), tuple(sorted(self._active)), ())
        self._active = frozenset()
        return change

    def lost_unexplained(self, mask_R: Sequence[int] | NDArray[np.int32]) -> list[Member]:
        """Members that did not take part to the end, by the mask that a graph has left, and that
        nobody has given up: kernels have waited for them in vain."""
        gone = self._given_up_ranks(self.epoch)
        return sorted(m for m in self.members if not mask_R[m.rank] and m.rank not in gone)

    def lost_ranks(self, mask_R: Sequence[int] | NDArray[np.int32]) -> list[RankId]:
        """Members that did not take part to the end, by the mask that the step has left."""
        return sorted(m.rank for m in self.members if not mask_R[m.rank])

    def _given_up_ranks(self, epoch: Epoch) -> set[RankId]:
        return {rank for rank, without in self._given_up.items() if without > epoch}
