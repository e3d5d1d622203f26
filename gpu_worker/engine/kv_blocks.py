"""The paged KV cache as the scheduler sees it: which blocks are free, and the block table of every
running sequence. The blocks' contents are the model's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class KvBlocks:
    """Tables live in the rows of one array, so that a step's block tables are one gather.

    A row belongs to one sequence from `open` to `close`. Callers ask `num_free` first: running out
    is the scheduler's decision to make, here it is a broken invariant.
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

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def capacity_tokens(self, row: int) -> int:
        """Tokens that the blocks of this row can hold."""
        return self._lengths[row] * self.block_tokens

    def open(self, num_blocks: int) -> int:
        """A row with so many blocks."""
        row = self._free_rows.pop()
        self.extend(row, num_blocks)
        return row

    def extend(self, row: int, num_blocks: int) -> None:
        assert num_blocks <= len(self._free), "KV blocks handed out that do not exist"
        length = self._lengths[row]
        for column in range(length, length + num_blocks):
            self._tables[row, column] = self._free.pop()
        self._lengths[row] = length + num_blocks

    def shrink(self, row: int, num_blocks: int) -> None:
        """Gives back the last blocks of a row, as if they had never been taken."""
        end = self._lengths[row]
        begin = end - num_blocks
        assert begin >= 0, "more KV blocks given back than taken"
        self._free.extend(reversed(self._tables[row, begin:end].tolist()))
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
