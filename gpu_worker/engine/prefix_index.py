"""Which KV block holds which named content, and which named block is evicted first.

Names form a tree: each has the name before it in its chain as parent. A block is named after its
parent is and evicted before it, so the index always holds whole branches from the root. Of a
chain's names the known ones therefore come first, and bisection finds the longest cached prefix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """A named block is in use, or idle. Idle ones are evicted in the order in which they became
    idle. A sequence releases its last block first, so children are evicted before their parents."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_named(self) -> int:
        return len(self._name_of)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def num_known(self, chain: Sequence[bytes]) -> int:
        """Length of the longest prefix of this chain of names that is here."""
        return bisect_left(chain, True, key=lambda name: name not in self._block_of)

    def num_in_use(self, chain: Sequence[bytes]) -> int:
        """Length of the longest prefix that is in use: a row that uses a block uses its parents."""

        def is_unused(name: bytes) -> bool:
            block = self._block_of.get(name)
            return block is None or block in self._idle

        return bisect_left(chain, True, key=is_unused)

    def block_of(self, name: bytes) -> int | None:
        return self._block_of.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._name_of.get(block)

    def add(self, name: bytes, block: int) -> None:
        """Names a block that is in use."""
        assert name not in self._block_of, "a name has one block"
        assert block not in self._name_of, "a block has one name"
        self._block_of[name] = block
        self._name_of[block] = name

    def mark_used(self, block: int) -> None:
        """An idle block has a user."""
        del self._idle[block]

    def mark_idle(self, block: int) -> None:
        """A named block has lost its last user."""
        assert block in self._name_of
        self._idle[block] = None

    def next_to_evict(self) -> int | None:
        """The block that `evict` would take."""
        return next(iter(self._idle), None)

    def evict(self) -> int:
        """Takes the name off the block that has been idle for longest, for other contents."""
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._name_of.pop(block)]
        return block
