"""The sending side of one link, as the exchange sees it. See `transfer_outbox` for Mooncake and
`memory_outbox` for memory that both ranks map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.types import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Where this rank may write: the region that `target` has given to it. `memory` is the region
    itself, if this process could open it."""

    target: Member
    generation: int
    transfer_name: str
    address: int
    memory: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)


class WriteStatus(Enum):
    """The status of a message buffer's last write."""

    DONE = "done"
    PENDING = "pending"
    FAILED = "failed"


class Outbox(Protocol):
    """Messages to one peer. Engine thread only."""

    link: Link
    broken: str
    """Why it can send nothing any more, or an empty string."""

    @property
    def bell(self) -> int:
        """The address at which to ring for the peer after a message; 0 if `commit` sends it."""
        ...

    @property
    def heads(self) -> tuple[int, ...]:
        """The addresses at which to build messages, by index. Not while its last write is
        pending."""
        ...

    def commit(self, index: int, nbytes: int) -> None:
        """Sends the sealed message of `nbytes` that was built there, if it is not already the
        peer's. The peer sees all of it or nothing."""
        ...

    def poll_write(self, index: int) -> WriteStatus: ...

    def progress(self) -> bool:
        """Advances every write. Whether one is still pending."""
        ...

    def unsent(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Index and bytes of the messages that a broken outbox could not send."""
        ...

    def take_over(self, old: Outbox) -> None:
        """Sends what the broken outbox `old` could not send."""
        ...

    def forget_failed(self) -> None:
        """Drops unsent messages: after the end of their epoch nobody needs them."""
        ...

    def release(self, *, is_overdue: bool) -> bool:
        """Implements `regions.RegisteredMemory`. After it was called only it may be called."""
        ...
