"""On which card of its host each rank runs. Whoever reads the host's devices is `count_cards`; the
rest is pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from shared.types import DeviceKind, RankId

FLAG = "--cuda-device"
_ENVIRONMENT = "STARFISH_RANK_CUDA_DEVICE"
_DEVICES = Path("/dev")


class Cards:
    """Ranks take the host's cards in turn, by their numbers. A rank that comes from another host
    may find its card taken: then it gets one that is free, or else the one with the fewest
    ranks."""

    def __init__(self, num_cards: int) -> None:
        """0: ranks choose for themselves."""
        self._num_cards = num_cards
        self._of_rank: dict[RankId, int] = {}

    def take(self, rank: RankId) -> tuple[str, ...]:
        """The flags that tell it to a rank's process, which keeps the card until `free`."""
        if not self._num_cards:
            return ()
        self._of_rank.pop(rank, None)
        taken = Counter(self._of_rank.values())
        turn = rank % self._num_cards
        card = min(range(self._num_cards), key=lambda each: (taken[each], each != turn, each))
        self._of_rank[rank] = card
        return FLAG, str(card)

    def adopt(self, rank: RankId, argv: Sequence[str]) -> None:
        """A process that an earlier agent started with this command line."""
        if self._num_cards:
            said = dict(pairwise(argv)).get(FLAG, "")
            self._of_rank[rank] = int(said) if said.isdecimal() else rank % self._num_cards

    def free(self, rank: RankId) -> None:
        self._of_rank.pop(rank, None)


def count_cards(
    device: str,
    rank_flags: Sequence[str],
    environ: Mapping[str, str],
    *,
    devices: Path = _DEVICES,
) -> int:
    """Those that ranks of this host see. 0 if they use none, or have been told which. Touches no
    driver."""
    is_told = environ.get(_ENVIRONMENT) or any(
        word.partition("=")[0] == FLAG for word in rank_flags
    )
    if is_told or device == DeviceKind.CPU.value:
        return 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(devices.glob("nvidia[0-9]*")))
    names = [name.strip() for name in visible.split(",")]
    # CUDA sees those before the first that it does not know.
    known = names.index("-1") if "-1" in names else len(names)
    return len([name for name in names[:known] if name])
