"""The paged KV cache as the scheduler sees it: which blocks are free, which are shared, and the
block table of every running sequence. The model owns the blocks' contents.

Theory of operation. A block is free, private to one row, or named. A name identifies contents
(`block_names`). A named block is never written again, so any number of rows may have it in their
tables. When none has, it keeps its name until its memory is needed.

    event            free                private                    named
    open, extend     → private           –                          one more row (open, by name), or
                                                                    idle: evicted → private
    publish          –                   → named; or → free, where  –
                                         the name has a block,
                                         which replaces it
    shrink, close    –                   → free                     one row less

A row's table is named blocks first, in the order of its chain, then private ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.prefix_index import PrefixIndex


class KvBlocks:
    """The tables are the rows of one array, so that a step's block tables are one gather.

    A row belongs to one sequence from `open` to `close`. Callers check `num_free` first: to run out
    of blocks here is a broken invariant.
    """

    def __init__(
        self, *, num_blocks: int, block_tokens: int, rows_max: int, row_blocks_max: int
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # Popped from the end: low ids first, and the block freed last is used first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._free_rows = list(range(rows_max - 1, -1, -1))
        self._tables = np.full((rows_max, row_blocks_max), -1, dtype=np.int32)
        self._lengths = [0] * rows_max
        self._num_users = [0] * num_blocks  # rows that have the block in their table
        self._index = PrefixIndex()

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out; idle named ones then lose their names."""
        return len(self._free) + self._index.num_idle

    @property
    def num_named(self) -> int:
        return self._index.num_named

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def capacity_tokens(self, row: int) -> int:
        """Tokens that the blocks of this row can hold."""
        return self._lengths[row] * self.block_tokens

    def num_cached(self, names: Sequence[bytes]) -> int:
        """Length of the longest cached prefix of this chain, in blocks."""
        return self._index.num_known(names)

    def num_needed(self, num_blocks: int, names: Sequence[bytes]) -> int:
        """By how much `open` with these arguments would lower `num_free`."""
        return num_blocks - self._index.num_in_use(names)

    def open(self, num_blocks: int, names: Sequence[bytes] = ()) -> int:
        """A row of so many blocks, of which the first `num_cached(names)` hold what `names` say."""
        row = self._free_rows.pop()
        num_cached = self._index.num_known(names)
        for column in range(num_cached):
            self._tables[row, column] = self._use_named(names[column])
        self._lengths[row] = num_cached
        self.extend(row, num_blocks - num_cached)
        return row

    def extend(self, row: int, num_blocks: int) -> None:
        assert num_blocks <= self.num_free, "KV blocks handed out that do not exist"
        length = self._lengths[row]
        for column in range(length, length + num_blocks):
            block = self._free.pop() if self._free else self._index.evict()
            self._num_users[block] = 1
            self._tables[row, column] = block
        self._lengths[row] = length + num_blocks

    def publish(self, row: int, column: int, name: bytes) -> None:
        """Names the row's block in this column: it is full and its contents will not change. Those
        of all earlier columns are published. If a block has the name already, it replaces this one:
        the contents are equal to the bit, and this one is freed."""
        mine = int(self._tables[row, column])
        assert self._index.name_of(mine) is None, "a block is published once"
        if self._index.block_of(name) is None:
            self._index.add(name, mine)
            return
        self._tables[row, column] = self._use_named(name)
        self._release(mine)

    def shrink(self, row: int, num_blocks: int) -> None:
        """Gives back the last blocks of a row, the last one first."""
        end = self._lengths[row]
        begin = end - num_blocks
        assert begin >= 0, "more KV blocks given back than taken"
        for block in reversed(self._tables[row, begin:end].tolist()):
            self._release(block)
        self._tables[row, begin:end] = -1
        self._lengths[row] = begin

    def close(self, row: int) -> None:
        self.shrink(row, self._lengths[row])
        self._free_rows.append(row)

    def tables(self, rows: list[int]) -> NDArray[np.int32]:
        """`[S, B]`: a copy of the tables of these rows, padded with -1."""
        width = max((self._lengths[row] for row in rows), default=0)
        gathered: NDArray[np.int32] = self._tables[rows, :width]
        return gathered

    def blocks_of(self, row: int, begin: int, end: int) -> list[int]:
        """The blocks in these columns of the row's table."""
        blocks: list[int] = self._tables[row, begin:end].tolist()
        return blocks

    def name_of(self, block: int) -> bytes | None:
        return self._index.name_of(block)

    def _use_named(self, name: bytes) -> int:
        block = self._index.block_of(name)
        assert block is not None
        if not self._num_users[block]:
            self._index.mark_used(block)
        self._num_users[block] += 1
        return block

    def _release(self, block: int) -> None:
        assert self._num_users[block] > 0, "a KV block given back that nobody has"
        self._num_users[block] -= 1
        if self._num_users[block]:
            return
        if self._index.name_of(block) is None:
            self._free.append(block)
        else:
            self._index.mark_idle(block)
