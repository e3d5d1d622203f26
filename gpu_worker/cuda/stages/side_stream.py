"""Work that runs beside the current stream, between two of its points. In a captured graph it is a
branch, which the card computes while the trunk waits for peers."""

from __future__ import annotations

from collections.abc import Callable

import torch


class SideStream:
    """`fork`, `run`, `join`, in this order and on one thread. On the CPU, which has no streams,
    work is done where it is handed in."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._forked: torch.cuda.Event | None = None

    def fork(self) -> None:
        """Here the work may begin: it sees what the current stream has enqueued so far."""
        if self._stream is not None:
            self._forked = torch.cuda.current_stream(self._stream.device).record_event()

    def run(self, work: Callable[[], None]) -> None:
        """Until `join` nobody else touches what the work writes, nor writes what it reads. A
        capture may not end in between."""
        if self._stream is None:
            work()
            return
        assert self._forked is not None, "nothing has been forked"
        self._stream.wait_event(self._forked)
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        """What the current stream enqueues from now on sees the work done."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
