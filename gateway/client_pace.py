"""When the next piece of a client's work may begin, so that one with much of it takes no more than
a part of the event loop from others. Pure."""

from __future__ import annotations

_FORGET_ABOVE = 256


class ClientPace:
    """Each client's pieces follow one another, each after the time that the one before has been
    given. `burst_s`: so much of it may have been used in advance."""

    def __init__(self, *, burst_s: float = 0.0) -> None:
        self._burst_s = burst_s
        self._free_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._free_at)

    def reserve(self, client: str, given_s: float, now: float) -> float:
        """A piece that is given so much time. Returns how long it waits before it begins."""
        free_at = max(self._free_at.get(client, now), now)
        self._free_at[client] = free_at + given_s
        if len(self._free_at) > _FORGET_ABOVE:
            self._forget_idle(now)
        return max(0.0, free_at - now - self._burst_s)

    def _forget_idle(self, now: float) -> None:
        self._free_at = {name: at for name, at in self._free_at.items() if at > now}
