"""What the parts of KV copies ask of each other. A *copy* is the content of a full KV block of a
running session, kept in the host memory of another rank, the session's *backup rank*, so that the
session can go on there without computing its tokens again.

Theory of operation. Blocks are named by all tokens up to their end (`engine/block_names.py`), and a
named block is never written again. After each step the source hands newly named blocks to its
`ReplicaWriter`, which reads them out of the cache and has them written into a region that the
backup rank keeps for this life of the source. There a slot is known by its block's name only from
the moment when its write has completed, and until the backup rank has said that it knows it no
more; the source never writes to a slot that is known. So whatever is found by name is whole, also
when the source dies, stops or wakes up in the middle of a write.

Copies are an offer, never a duty: where one is missing, its tokens are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.types import Member, RankId, SessionId

Bytes = NDArray[np.uint8]


class BlockCache(Protocol):
    """The contents of the model's KV blocks, all layers of a block side by side. Engine thread."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def layout(self) -> str:
        """Says how the bytes are to be read: ranks of equal layout can load each other's blocks."""
        ...

    def staging_buffer(self) -> Bytes:
        """New memory for one block's content, of the kind that `save` is fastest into. Never freed
        before the process ends."""
        ...

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        """Copies the content of a block whose step has been committed, as it is now, however soon
        the block is handed out anew. May return before it is done; the answer tells, from any
        thread and for ever, whether it is."""
        ...

    def load(self, block: int, content: Bytes) -> None:
        """Fills a block before whatever step is begun next, and after all that were begun.
        `content` may be overwritten on return."""
        ...


class ReplicaChannel(Protocol):
    """The way from this rank to one life of a backup rank. A new one takes its place when it
    fails: nothing that was sent on the old one is of use then. Engine thread, but `is_open`."""

    @property
    def target(self) -> Member: ...

    @property
    def is_on_other_node(self) -> bool:
        """Whether the target runs on another node than this rank."""
        ...

    @property
    def num_slots(self) -> int: ...

    @property
    def is_open(self) -> bool:
        """Turns false for good."""
        ...

    def take_staging_buffer(self) -> Bytes | None:
        """Memory to save a block into; None while too much is under way."""
        ...

    def send(
        self, staging_buffer: Bytes, slot: int, name: bytes, is_saved: Callable[[], bool]
    ) -> None:
        """Once it is saved, write it to the slot and make it known by its name. `staging_buffer`
        goes back to the channel."""
        ...

    @property
    def has_confirmations(self) -> bool:
        """`take_sent` or `take_dropped` would give something."""
        ...

    def take_sent(self) -> Sequence[bytes]:
        """Names that have become known at the target since the last call."""
        ...

    def drop(self, slots: Sequence[int]) -> None:
        """Ask the target to know these no more."""
        ...

    def take_dropped(self) -> Sequence[int]:
        """Slots that may be written anew, since the last call."""
        ...


class ReplicaStore(Protocol):
    """What peers have left here. Any thread."""

    def find(self, name: bytes) -> Bytes | None:
        """A view of the content that has this name; it stands until the calling step is planned
        (regions are released only long after their source has gone)."""
        ...


class ReplicaEndpoint(Protocol):
    """This rank's end of all channels."""

    @property
    def store(self) -> ReplicaStore: ...

    def channels(self) -> Mapping[RankId, ReplicaChannel]:
        """Those that are open, by the rank of their target."""
        ...


class KvReplicator(Protocol):
    """Copies as the scheduler and the engine see them; `NoKvReplication` where there are none.
    Engine thread."""

    def use(self, others: Sequence[Member]) -> None:
        """A map is adopted: these can take sessions over."""
        ...

    def restore(self, names: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Fills blocks with the contents of these names, in order, as far as they are kept here;
        returns how many."""
        ...

    def offer(self, session: SessionId, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """The next named blocks of a running session, after those that were offered since its last
        `forget`. They hold what they hold until `forget`."""
        ...

    def forget(self, session: SessionId) -> None:
        """It has ended, or given up its blocks; unknown ones are ignored."""
        ...

    def backup_of(self, session: SessionId) -> RankId | None:
        """Who holds a copy of at least its first block, and is asked to take the next ones."""
        ...

    def pump(self) -> bool:
        """Between steps: sends what has been offered, a little at a time. Whether there is more to
        send soon, without a further event."""
        ...
