"""The connections to an HTTP port: which new one is accepted, which one makes room for it, and
which one has waited too long for its client. Decides only; the sockets are `http_listener`'s.

| state    | meaning                            | ends after                                 |
|----------|------------------------------------|--------------------------------------------|
| RECEIVES | a request's header is not whole    | `header_timeout_s`, whatever arrives       |
| SERVES   | a handler runs or the answer flows | no limit here: body and answer have theirs |
| IDLES    | answered; nothing arrives          | `idle_timeout_s`                           |

A connection begins in RECEIVES: who connects means to ask. One that is not served waits for its
client, and who only waits keeps nobody out: where there is no room, the one that has waited longest
makes it."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
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
        self._waiting = _Waiting()
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._connections)

    def makes_room_for(self, address: str) -> ConnectionId | None:
        """The connection that has to close before one of this address opens: of those that wait for
        their client, of this address if it has as many as it may have, the one that has waited
        longest. None if there is room, or if all are served."""
        refusal, client = self._refusal_of(address)
        if refusal is None:
            return None
        return self._waiting.oldest(client if refusal is Refusal.ADDRESS_FULL else None)

    def open(self, address: str, now: float) -> ConnectionId | Refusal:
        refusal, client = self._refusal_of(address)
        if refusal is not None:
            return refusal
        self._per_client[client] = self._per_client.get(client, 0) + 1
        self._last_id += 1
        connection = ConnectionId(self._last_id)
        self._connections[connection] = _Connection(
            client, _State.RECEIVES, now + self._limits.header_timeout_s, now
        )
        self._waiting.add(connection, client)
        return connection

    def on_bytes(self, connection: ConnectionId, now: float) -> None:
        """Something arrived. Only the first bytes after an answer matter."""
        known = self._connections[connection]
        if known.state is _State.IDLES:
            known.state = _State.RECEIVES
            known.deadline = now + self._limits.header_timeout_s
            self._waiting.remove(connection, known.client)  # it waits anew
            self._waiting.add(connection, known.client)

    def on_request(self, connection: ConnectionId) -> None:
        known = self._connections[connection]
        known.state = _State.SERVES
        self._waiting.remove(connection, known.client)

    def on_answer(self, connection: ConnectionId, now: float) -> None:
        """The handler has ended; its answer may still be on the way. Nothing happens if the
        connection has closed meanwhile."""
        if known := self._connections.get(connection):
            known.state = _State.IDLES
            known.deadline = now + self._limits.idle_timeout_s
            known.unsent_bytes = 0
            self._waiting.add(connection, known.client)

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
        self._waiting.remove(connection, client)
        self._per_client[client] -= 1
        if not self._per_client[client]:
            del self._per_client[client]

    def _refusal_of(self, address: str) -> tuple[Refusal | None, str]:
        """And whom the address is counted for."""
        client = client_of(address)
        if self._per_client.get(client, 0) >= self._limits.per_address_max:
            return Refusal.ADDRESS_FULL, client
        is_full = len(self._connections) >= self._limits.connections_max
        return (Refusal.FULL if is_full else None), client


class _Waiting:
    """Connections that wait for their client, the longest first: of all clients, and of each."""

    def __init__(self) -> None:
        self._all: OrderedDict[ConnectionId, None] = OrderedDict()
        self._of_client: dict[str, OrderedDict[ConnectionId, None]] = {}

    def add(self, connection: ConnectionId, client: str) -> None:
        self._all[connection] = None
        self._of_client.setdefault(client, OrderedDict())[connection] = None

    def remove(self, connection: ConnectionId, client: str) -> None:
        """Nothing happens if it does not wait."""
        if connection not in self._all:
            return
        del self._all[connection]
        of_client = self._of_client[client]
        del of_client[connection]
        if not of_client:
            del self._of_client[client]

    def oldest(self, client: str | None) -> ConnectionId | None:
        """Of all clients, if `client` is None."""
        waiting = self._all if client is None else self._of_client.get(client, ())
        return next(iter(waiting), None)


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
