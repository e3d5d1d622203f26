"""A gateway's estimate of a rank's prefix cache: the blocks of the prompts that it sent there
recently. If the estimate is wrong, a rank computes a prompt that another rank had in its cache."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence


def prefix_chain(
    prompt: Sequence[int], block_tokens: int, *, cache_salt: bytes = b""
) -> tuple[int, ...]:
    """One hash per full block of the prompt, over the salt of its blocks' names and all tokens up
    to the block's end. It is the same in every process, because hashes of numbers are not
    salted."""
    chain = []
    parent = int.from_bytes(cache_salt[:8], "little")
    for begin in range(0, len(prompt) - block_tokens + 1, block_tokens):
        parent = hash((parent, *prompt[begin : begin + block_tokens]))
        chain.append(parent)
    return tuple(chain)


class PrefixMemory:
    """The `blocks_max` blocks that were served last. As in the rank, a block is forgotten before
    its parent, so the remembered blocks of a chain are always its first ones."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._served: OrderedDict[int, None] = OrderedDict()  # the latest at the end

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
