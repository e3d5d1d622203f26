"""Work that runs beside the current stream, between two of its points. In a captured graph it is a
parallel path, which the card computes while the main path waits for peers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_worker.cuda.streams import on_stream


class SideStream:
    """Call `fork`, `run` and `join` in this order and on one thread. The CPU has no streams, so
    there `run` does the work at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._forked: torch.cuda.Event | None = None

    def fork(self) -> None:
        """The work may begin here. It sees what the current stream has enqueued so far."""
        if self._stream is not None:
            self._forked = torch.cuda.current_stream(self._stream.device).record_event()

    def run(self, work: Callable[[], None]) -> None:
        """Until `join`, nothing else may touch what the work writes or write what it reads. A
        capture must not end before `join`."""
        if self._stream is None:
            work()
            return
        assert self._forked is not None, "nothing has been forked"
        self._stream.wait_event(self._forked)
        with on_stream(self._stream):
            work()

    def join(self) -> None:
        """What the current stream enqueues after this call sees the results of the work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
