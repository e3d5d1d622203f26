"""What a rank's prefix cache is believed to hold: the blocks of the prompts that were sent there
lately. A belief may be wrong; then a prompt is computed where it need not have been."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence


def prefix_chain(prompt: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """A hash for each full block of the prompt, of all tokens up to its end. The same in every
    process: hashes of numbers are not salted."""
    chain = []
    parent = 0
    for begin in range(0, len(prompt) - block_tokens + 1, block_tokens):
        parent = hash((parent, *prompt[begin : begin + block_tokens]))
        chain.append(parent)
    return tuple(chain)


class PrefixMemory:
    """At most `blocks_max` blocks, those served last. As in the rank, blocks are forgotten before
    their parents, so that of a chain the remembered ones come first."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._served: OrderedDict[int, None] = OrderedDict()  # served last at the end

    def __len__(self) -> int:
        return len(self._served)

    def num_known(self, chain: Sequence[int]) -> int:
        """Length of the longest prefix of the chain that was served here."""
        return bisect_left(chain, True, key=lambda block: block not in self._served)

    def remember(self, chain: Sequence[int]) -> None:
        for block in reversed(chain[: self._blocks_max]):
            self._served[block] = None
            self._served.move_to_end(block)
        self._forget_oldest()

    def resize(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._forget_oldest()

    def clear(self) -> None:
        self._served.clear()

    def _forget_oldest(self) -> None:
        while len(self._served) > self._blocks_max:
            self._served.popitem(last=False)
