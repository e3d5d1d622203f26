"""The paged KV cache of one rank: memory only. Which sequence owns which block is for the
scheduler to say."""

from __future__ import annotations

import numpy as np


class KvCache:
    """Layers L, blocks B, KV heads J, head size D, block_tokens U: `k_LBJDU` and `v_LBJUD`.

    Keys lie transposed inside a block, so that scores of a block's tokens are computed side by
    side. Starts as zeros, written now: the first touch of fresh memory costs milliseconds a page on
    a virtual machine, and must not fall into a step. Stale values stay finite for ever, and are
    masked by position.
    """

    def __init__(
        self, *, num_layers: int, num_blocks: int, block_tokens: int, kv_heads: int, head_dim: int
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        leading = (num_layers, num_blocks, kv_heads)
        self.k_LBJDU = np.zeros((*leading, head_dim, block_tokens), dtype=np.float32)
        self.v_LBJUD = np.zeros((*leading, block_tokens, head_dim), dtype=np.float32)

        self.k_LBJDU.fill(0.0)
        self.v_LBJUD.fill(0.0)

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens
