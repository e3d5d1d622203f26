"""The one way to enter a CUDA stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work inside is enqueued on `stream`, from any thread.

    The card of the stream becomes the current one first. Without that, leaving the stream switches
    the thread back to its own current card, which is card 0 on a new thread: CUDA then creates a
    context on a card that this rank does not use, and holds Python's lock for about 0.1 s."""
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
