"""Who takes part in an exchange: the lives that this rank has met, the members of the adopted map,
and those of them that a newer epoch has given up. Decides; touches no device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    """Not thread-safe: the exchange locks around it."""

    def __init__(self, own: Member) -> None:
        self._own = own
        self._met: dict[RankId, Incarnation] = {}
        self._given_up: dict[RankId, Epoch] = {}
        self._active: frozenset[RankId] = frozenset()
        self.members: frozenset[Member] = frozenset({own})
        self.epoch = Epoch(0)

    def meet(self, lives: Mapping[RankId, Incarnation]) -> None:
        """Connected from now on."""
        self._met.update(lives)

    def has_met(self, member: Member) -> bool:
        return self._met.get(member.rank) == member.incarnation

    def part(self, ranks: Collection[RankId]) -> list[RankId]:
        """The connected among them, which are to be disconnected. Raises ConnectionError where one
        of them is a member of the adopted map."""
        met = sorted(rank for rank in ranks if rank in self._met)
        members = {m.rank for m in self.members}
        if still := members & set(met):
            raise ConnectionError(f"ranks {sorted(still)} are members of the adopted map")
        for rank in met:
            del self._met[rank]
        return met

    def give_up(self, dead: Collection[Member], epoch: Epoch) -> list[RankId]:
        """Map `epoch` is without these lives. Returns the ranks that kernels need not wait for any
        more; a life not met, or one whose successor was met already, is none of them."""
        met = sorted(m.rank for m in dead if self._met.get(m.rank) == m.incarnation)
        for rank in met:
            self._given_up[rank] = max(epoch, self._given_up.get(rank, epoch))
        return met

    def adopt(self, expert_map: ExpertMap) -> MaskChange:
        """Who was given up by a newer map than this one stays so: the next step is abandoned at
        once, instead of waiting for the dead."""
        assert expert_map.has(self._own), f"{self._own} is no member of the map"
        peers = {m.rank: m.incarnation for m in expert_map.members if m != self._own}
        unmet = sorted(rank for rank, life in peers.items() if self._met.get(rank) != life)
        assert not unmet, f"ranks {unmet} are members but not connected"
        gone = {rank for rank, epoch in self._given_up.items() if epoch > expert_map.epoch}
        active = frozenset(peers.keys() - gone)
        change = MaskChange(
            active | {self._own.rank},
            tuple(sorted(self._active - active)),
            tuple(sorted(active - self._active)),
        )
        self._active = active
        self.members = frozenset(expert_map.members)
        self.epoch = expert_map.epoch
        return change

    def lost(self, mask_R: Sequence[int] | NDArray[np.int32]) -> list[RankId]:
        """Members that did not take part to the end, by the mask that the step has left."""
        return sorted(m.rank for m in self.members if not mask_R[m.rank])
