"""The simulated network: in-memory connections with latency, between hosts that can be cut off from
each other. Cutting loses nothing that TCP would keep: bytes wait, and arrive after the heal."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.sim_loop import SimLoop, SimProcess, current_process, in_process

CONNECT_TIMEOUT_S = 30.0


class SimTransport(asyncio.Transport):
    """One end of a connection. Bytes keep their order; each write arrives after a latency."""

    def __init__(self, network: SimNetwork, owner: SimProcess) -> None:
        super().__init__()
        self._network = network
        self.owner = owner
        self.context = in_process(owner)
        self.peer: SimTransport | None = None
        self.protocol: Any = None
        self.closing = False
        self.closed = False
        self._inbound: deque[bytes | Exception | None] = deque()
        self._arrive_at = 0.0

    def write(self, data: Any) -> None:
        if self.closing or not data:
            return
        self._network.carry(self, bytes(data))

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self._network.carry(self, None)
            self._lose(None)

    def abort(self) -> None:
        if not self.closing:
            self.closing = True
            self._network.carry(self, ConnectionResetError("reset by peer"))
            self._lose(None)

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: Any = None, low: Any = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def is_reading(self) -> bool:
        return True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("sim", 0) if name in ("peername", "sockname") else default

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def receive(self, item: bytes | Exception | None) -> None:
        """In the owner's context: what the network delivers."""
        if self.closed:
            return
        if isinstance(item, bytes):
            self.protocol.data_received(item)
        elif isinstance(item, Exception):
            self._lose(item)
        elif not self.protocol.eof_received():
            self.close()

    def _lose(self, error: Exception | None) -> None:
        if not self.closed:
            self.closed = self.closing = True
            loop = self._network.loop
            loop.call_soon(self.protocol.connection_lost, error, context=self.context.copy())


class SimServer:
    """What `asyncio.start_server` hands out."""

    def __init__(self, network: SimNetwork, address: tuple[str, int]) -> None:
        self._network = network
        self.address = address
        self.sockets = (self,)

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def close(self) -> None:
        self._network.listeners.pop(self.address, None)

    async def wait_closed(self) -> None: ...

    def is_serving(self) -> bool:
        return self.address in self._network.listeners

    async def __aenter__(self) -> SimServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class SimNetwork:
    """Listeners by address, live connections, and the pairs of hosts that cannot reach each
    other."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.listeners: dict[tuple[str, int], tuple[Callable[[], Any], SimProcess]] = {}
        self.cut: set[frozenset[str]] = set()
        self._last_cut: dict[str, float] = {}  # when a cut of this host last ended
        self._ends: list[SimTransport] = []
        self._held: list[tuple[SimTransport, bytes | Exception | None]] = []
        self._ports = 20000

    def latency_s(self) -> float:
        return self.rng.uniform(0.0001, 0.0008)

    def reachable(self, a: str, b: str) -> bool:
        return a == b or frozenset((a, b)) not in self.cut

    @property
    def cut_until(self) -> dict[str, float]:
        """For each host that was cut from another one, until when; now, if it still is."""
        now = self.loop.time()
        return {**self._last_cut, **{host: now for pair in self.cut for host in pair}}

    def sever(self, a: str, b: str) -> None:
        self.cut.add(frozenset((a, b)))

    def heal(self) -> None:
        self._last_cut = self.cut_until
        self.cut.clear()
        self._carry_held()

    def reconnect(self, a: str, b: str) -> None:
        self._last_cut = self.cut_until
        self.cut.discard(frozenset((a, b)))
        self._carry_held()

    def _carry_held(self) -> None:
        held, self._held = self._held, []
        for sender, item in held:
            self.carry(sender, item)

    def listen(self, factory: Callable[[], Any], host: str, port: int) -> SimServer:
        owner = current_process.get()
        assert owner is not None
        if not port:
            self._ports += 1
            port = self._ports
        address = (owner.host, port)
        if address in self.listeners:
            raise OSError(98, "address in use")
        self.listeners[address] = (factory, owner)
        owner.on_death.append(lambda: self._drop_listener(address, owner))
        return SimServer(self, address)

    def _drop_listener(self, address: tuple[str, int], owner: SimProcess) -> None:
        if self.listeners.get(address, (None, None))[1] is owner:
            del self.listeners[address]

    async def connect(self, factory: Callable[[], Any], host: str, port: int) -> Any:
        owner = current_process.get()
        assert owner is not None
        waited_s = 0.0
        while not self.reachable(owner.host, host):
            await asyncio.sleep(0.05)
            waited_s += 0.05
            if waited_s > CONNECT_TIMEOUT_S:
                raise TimeoutError("connect timed out")
        await asyncio.sleep(self.latency_s())
        listener = self.listeners.get((host, port))
        if listener is None or listener[1].dead:
            raise ConnectionRefusedError(f"{host}:{port} refused")
        here, there = SimTransport(self, owner), SimTransport(self, listener[1])
        here.peer, there.peer = there, here
        self._ends += (here, there)
        owner.on_death.append(lambda: self._process_died(here))
        listener[1].on_death.append(lambda: self._process_died(there))
        there.protocol = there.context.run(listener[0])
        there.context.run(there.protocol.connection_made, there)
        here.protocol = factory()
        here.protocol.connection_made(here)
        return here, here.protocol

    def _process_died(self, end: SimTransport) -> None:
        """The kernel resets the dead process's connections."""
        if not end.closed:
            end.closed = end.closing = True
            self.carry(end, ConnectionResetError("reset by peer"))

    def carry(self, sender: SimTransport, item: bytes | Exception | None) -> None:
        receiver = sender.peer
        if receiver is None or receiver.owner.dead:
            return
        if not self.reachable(sender.owner.host, receiver.owner.host):
            self._held.append((sender, item))
            return
        arrive_at = max(receiver._arrive_at, self.loop.time() + self.latency_s())
        receiver._arrive_at = arrive_at + 1e-6
        context: contextvars.Context = receiver.context.copy()
        self.loop.call_at(arrive_at, receiver.receive, item, context=context)
