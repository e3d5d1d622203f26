"""The KV blocks of running sequences: those that a sequence begins with, cached here or replicated
by a peer that had its session, and those that it fills and publishes. The scheduler decides when a
sequence runs.

The prefix cache. Full blocks whose step was committed are published under the hash of all tokens up
to their end, generated ones included, and are not written again. The hash begins with a salt, so
tenants do not find each other's blocks. A sequence begins with the longest published prefix of its
known tokens, less the last token, whose logits it needs; its first own block is the one after. Its
KV is the same to the bit, so tokens do not depend on what was cached. If a running sequence of
higher priority has yet to compute the very block that a waiting one would compute first, the
waiting one is passed over until that is done: n choices of one prompt cost one prefill. The blocks
that it would need stay reserved, so that those behind it cannot take them.

Replicas (`engine/kv_replication`). After its cached blocks a sequence begins with those that a peer
has stored here. They are restored while the plan is made, and published at once. A plan that has
restored many admits no more sequences: a rank whose peer has died must serve its own sessions, too.
"""

from __future__ import annotations

from collections.abc import Iterable

from gpu_worker.engine.block_names import extend_names
from gpu_worker.engine.kv_blocks import KvBlocks
from gpu_worker.engine.kv_replication import KvReplicator
from gpu_worker.engine.sequence import NO_ROW, Sequence
from shared.types import SessionId


class SequenceBlocks:
    """Implements this over `kv_blocks` and a replicator. If `is_shared` is false, every sequence
    computes all its blocks, and none is published."""

    def __init__(self, kv: KvBlocks, replicator: KvReplicator, *, is_shared: bool) -> None:
        self.num_restored = 0  # blocks, since the start
        self.num_prefix_tokens = 0
        self.num_prefix_cached = 0
        self._kv = kv
        self._replicator = replicator
        self._is_shared = is_shared

    def num_needed(self, sequence: Sequence) -> int:
        """By how much `open` would lower the number of free blocks."""
        num_blocks = self._kv.blocks_for(len(sequence.tokens))
        return self._kv.num_needed(num_blocks, self._usable_names(sequence))

    def awaits_another(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a running sequence of higher priority will compute its first missing block."""
        names = self._usable_names(sequence)
        column = self._kv.num_cached(names)
        if column >= len(names):
            return False
        return any(
            s.num_pending > 1
            and column < len(s.block_names)
            and s.block_names[column] == names[column]
            and s.priority < sequence.priority
            for s in running
        )

    def open(self, sequence: Sequence) -> None:
        """Gives it blocks for all its known tokens. What the cache or a replica has of them counts
        as computed, and stays in the cache even if the step that is being planned is abandoned."""
        names = self._usable_names(sequence)
        num_cached = self._kv.num_cached(names)
        row = self._kv.open(self._kv.blocks_for(len(sequence.tokens)), names)
        end = num_cached
        if num_cached < len(names):
            missing = names[num_cached:]
            end += self._replicator.restore(
                missing, self._kv.blocks_of(row, num_cached, len(names))
            )
        for column in range(num_cached, end):
            self._kv.publish(row, column, names[column])
        self.num_restored += end - num_cached
        sequence.row = row
        sequence.num_published = end
        sequence.num_computed = end * self._kv.block_tokens

    def close(self, sequence: Sequence) -> None:
        self._replicator.forget(sequence.session)
        self._kv.close(sequence.row)
        sequence.row = NO_ROW
        sequence.num_computed = sequence.num_published = sequence.num_offered = 0
        sequence.drafts = ()

    def rename(self, sequence: Sequence, session: SessionId) -> None:
        """It goes on as this session. Its blocks are offered again under the new name, by which the
        replicator knows the session; what it has stored of them, it finds."""
        self._replicator.forget(sequence.session)
        sequence.session = session
        sequence.num_offered = 0
        sequence.reported_backup = None

    def count_begun(self, sequence: Sequence) -> None:
        """Its first step since `open` is committed."""
        self.num_prefix_tokens += len(sequence.tokens)
        self.num_prefix_cached += sequence.num_computed
        if sequence.num_cached is None:  # else it was preempted, and finds its own blocks
            sequence.num_cached = sequence.num_computed

    def publish(self, sequence: Sequence) -> None:
        """Names the blocks that a committed step has filled."""
        end = sequence.num_computed // self._kv.block_tokens
        if end == sequence.num_published or not self._is_shared:
            return
        self._extend_names(sequence)
        for column in range(sequence.num_published, end):
            self._kv.publish(sequence.row, column, sequence.block_names[column])
        sequence.num_published = end

    def offer(self, sequence: Sequence) -> None:
        """Offers the replicator the published blocks that it does not know yet; none if the
        sequence does not run."""
        begin, end = sequence.num_offered, sequence.num_published
        if begin < end:
            blocks = self._kv.blocks_of(sequence.row, begin, end)
            self._replicator.offer(sequence.session, sequence.block_names[begin:end], blocks)
            sequence.num_offered = end

    def _usable_names(self, sequence: Sequence) -> list[bytes]:
        """Names of the blocks that it need not compute itself if they exist already."""
        if not self._is_shared:
            return []
        self._extend_names(sequence)
        num_usable = len(sequence.tokens) - 1
        if sequence.wants_prompt_logits:
            num_usable = sequence.num_scored
        return sequence.block_names[: num_usable // self._kv.block_tokens]

    def _extend_names(self, sequence: Sequence) -> None:
        extend_names(
            sequence.block_names,
            sequence.tokens,
            self._kv.block_tokens,
            salt=sequence.scheduling.cache_salt,
        )
