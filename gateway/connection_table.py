"""The connections of clients to one gateway: which new one is accepted, and which one has waited
too long for its client. Decides only; the sockets are `http_listener`'s.

| state    | meaning                            | ends after                                 |
|----------|------------------------------------|--------------------------------------------|
| RECEIVES | a request's header is not whole    | `header_timeout_s`, whatever arrives       |
| SERVES   | a handler runs or the answer flows | no limit here: body and answer have theirs |
| IDLES    | answered; nothing arrives          | `idle_timeout_s`                           |

A connection begins in RECEIVES: who connects means to ask."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum, auto
from typing import NewType

ConnectionId = NewType("ConnectionId", int)


class Refusal(Enum):
    FULL = "full"
    ADDRESS_FULL = "address_full"


class _State(Enum):
    RECEIVES = auto()
    SERVES = auto()
    IDLES = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    connections_max: int
    per_address_max: int
    header_timeout_s: float
    idle_timeout_s: float


@dataclass(slots=True)
class _Connection:
    client: str
    state: _State
    deadline: float
    opened_at: float
    unsent_bytes: int = 0


class ConnectionTable:
    """Times are those of one monotonic clock, in seconds."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._connections: dict[ConnectionId, _Connection] = {}
        self._per_client: dict[str, int] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._connections)

    def open(self, address: str, now: float) -> ConnectionId | Refusal:
        client = client_of(address)
        if len(self._connections) >= self._limits.connections_max:
            return Refusal.FULL
        if self._per_client.get(client, 0) >= self._limits.per_address_max:
            return Refusal.ADDRESS_FULL
        self._per_client[client] = self._per_client.get(client, 0) + 1
        self._last_id += 1
        connection = ConnectionId(self._last_id)
        self._connections[connection] = _Connection(
            client, _State.RECEIVES, now + self._limits.header_timeout_s, now
        )
        return connection

    def on_bytes(self, connection: ConnectionId, now: float) -> None:
        """Something arrived. Only the first bytes after an answer matter."""
        known = self._connections[connection]
        if known.state is _State.IDLES:
            known.state = _State.RECEIVES
            known.deadline = now + self._limits.header_timeout_s

    def on_request(self, connection: ConnectionId) -> None:
        self._connections[connection].state = _State.SERVES

    def on_answer(self, connection: ConnectionId, now: float) -> None:
        """The handler has ended; its answer may still be on the way. Nothing happens if the
        connection has closed meanwhile."""
        if known := self._connections.get(connection):
            known.state = _State.IDLES
            known.deadline = now + self._limits.idle_timeout_s
            known.unsent_bytes = 0

    def num_to_answer(self, now: float, *, silent_s: float) -> int:
        """Connections with a request that is not answered yet, or on which one may be on its way:
        they are receiving one, or have been open for less than `silent_s` without any."""
        return sum(
            known.state is _State.SERVES
            or (known.state is _State.RECEIVES and now < known.opened_at + silent_s)
            for known in self._connections.values()
        )

    def expired(self, now: float) -> list[ConnectionId]:
        return [
            connection
            for connection, known in self._connections.items()
            if known.state is not _State.SERVES and known.deadline <= now
        ]

    def spare(self, connection: ConnectionId, unsent_bytes: int, now: float) -> bool:
        """Whether an expired connection stays for another `idle_timeout_s`: it does as long as its
        client takes some of an answer that is not sent yet."""
        known = self._connections[connection]
        if known.state is not _State.IDLES or unsent_bytes in (0, known.unsent_bytes):
            return False
        known.unsent_bytes = unsent_bytes
        known.deadline = now + self._limits.idle_timeout_s
        return True

    def close(self, connection: ConnectionId) -> None:
        """Call it once for each opened connection."""
        client = self._connections.pop(connection).client
        self._per_client[client] -= 1
        if not self._per_client[client]:
            del self._per_client[client]


def client_of(address: str) -> str:
    """Whom an address is counted for. A host has a whole /64 of IPv6, and may come by IPv6 with an
    IPv4 address. Anything else than an address counts as it is."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))
