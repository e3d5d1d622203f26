"""The interfaces between the parts of KV replication. A *replica* is the content of a full KV block
of a running session, kept in the host memory of another rank, the session's *backup rank*, so that
the session can go on there without computing its tokens again.

Theory of operation. Blocks are named by all tokens up to their end (`engine/block_names.py`), and a
named block is never written again. After each step the source hands newly named blocks to its
`ReplicaWriter`, which reads them out of the cache and has them written into a region that the
backup rank keeps for this incarnation of the source. There a slot is known by its block's name only
after its write has completed, and until the backup rank has confirmed that it dropped the name. The
source never writes to a slot that is known. So a block that is found by name is complete, even if
the source dies, stops or wakes up in the middle of a write. It is genuine, too: a stranger who
wrote to the region does not know the instance's secret, so that the block does not fit its tag.

Replicas are optional: if one is missing, its tokens are computed again.
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
        """Describes the bytes: ranks of equal layout can load each other's blocks."""
        ...

    def staging_buffer(self) -> Bytes:
        """New memory for one block's content, of the kind that `save` is fastest into. Never freed
        before the process ends."""
        ...

    def save(self, block: int, into: Bytes) -> Callable[[], bool]:
        """Copies the present content of a block whose step has been committed, even if the block is
        handed out again soon. May return before the copy is done. The returned function says
        whether it is done; any thread may call it at any time."""
        ...

    def load(self, block: int, content: Bytes) -> None:
        """Fills a block after all steps that were begun and before the next one. The caller may
        overwrite `content` afterwards."""
        ...


class ReplicaChannel(Protocol):
    """The connection from this rank to one incarnation of a backup rank. When it fails, a new one
    replaces it, and nothing that was sent on the old one is of use. Engine thread, except
    `is_open`."""

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
        """Memory to save a block into; None while too many writes are in flight."""
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
        """Asks the target to drop the names of these slots."""
        ...

    def take_dropped(self) -> Sequence[int]:
        """Slots that may be written again, since the last call."""
        ...


class ReplicaStore(Protocol):
    """The replicas that peers have stored here. Any thread."""

    @property
    def num_rejected(self) -> int:
        """How many contents were not what their source had written, and were forgotten."""
        ...

    def find(self, name: bytes) -> Bytes | None:
        """The content that has this name, as its source has written it. It is valid until the
        calling step is planned."""
        ...


class ReplicaEndpoint(Protocol):
    """This rank's end of all channels."""

    @property
    def store(self) -> ReplicaStore: ...

    def channels(self) -> Mapping[RankId, ReplicaChannel]:
        """Those that are open, by the rank of their target."""
        ...


class KvReplicator(Protocol):
    """Replication as the scheduler and the engine see it; `NoKvReplication` if it is off. Engine
    thread."""

    def use(self, others: Sequence[Member]) -> None:
        """A map is adopted: these other members can take sessions over."""
        ...

    def restore(self, names: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Fills blocks with the contents of these names, in order, as far as they are kept here;
        returns how many."""
        ...

    @property
    def num_rejected(self) -> int:
        """Replicas kept here that were not what their source had written."""
        ...

    def offer(self, session: SessionId, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """The next named blocks of a running session, after those offered since its last `forget`.
        Their contents do not change until `forget`."""
        ...

    def forget(self, session: SessionId) -> None:
        """The session has ended, or given up its blocks. An unknown one is ignored."""
        ...

    def backup_of(self, session: SessionId) -> RankId | None:
        """The rank that holds a replica of at least its first block and takes the next ones."""
        ...

    def send_offered(self) -> bool:
        """Between steps: sends a little of what has been offered. Returns whether it can soon send
        more without a further event."""
        ...
