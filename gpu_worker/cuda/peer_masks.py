"""The masks of this rank's peers on its own card, mapped here, so that kernels which a dead peer
has left behind can be told to wait for nobody.

A process that is killed leaves its kernels on the card, and one of them may wait for what survivors
send it no more. Its memory is taken away under it some tenths of a second later; where ranks share
a card under MPS, the fault that this makes takes all ranks of the card with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from gpu_worker.cuda.shared_memory import MappedValues, SharedPlace
from shared.records import ExchangeHandles
from shared.types import Member, RankId


class PeerMasks:
    """Not thread-safe. The card must be the current device."""

    def __init__(self, card: str, num_ranks: int) -> None:
        self._card = card
        self._num_ranks = num_ranks
        self._masks: dict[Member, MappedValues] = {}

    def meet(self, peer: Member, handles: ExchangeHandles) -> None:
        """Raises ConnectionError where the peer is gone."""
        if handles.card == self._card:
            place = SharedPlace(bytes(handles.mask_handle), handles.mask_offset)
            self._masks[peer] = MappedValues(place, self._num_ranks)

    def part(self, ranks: Collection[RankId]) -> None:
        for peer in [m for m in self._masks if m.rank in ranks]:
            self._masks.pop(peer).close()

    def clear(self, dead: Iterable[Member], stream: torch.cuda.Stream) -> None:
        """Enqueued. Those of other cards are passed over."""
        for member in dead:
            if (mask := self._masks.get(member)) is not None:
                mask.zero(stream)


def name_of_card(device: torch.device) -> str:
    """The same in all processes that see it, whatever number it has there."""
    return str(torch.cuda.get_device_properties(device).uuid)
