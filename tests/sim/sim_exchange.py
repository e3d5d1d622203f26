"""The ranks' data network of the simulated cluster: the local exchange, its messages delayed, held
back by cuts and lost with their sender, its waits parked on virtual time."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

from shared.types import Member
from tests.sim.sim_loop import SimProcess, current_process
from tests.sim.sim_network import SimNetwork
from tests.support.local_exchange import LocalHub

SLOW_MESSAGES = 0.01


class ExchangeHost(Protocol):
    """What the hub needs of an engine's host."""

    def park_exchange(self) -> None: ...

    def arrived(self) -> None: ...


class SimHub(LocalHub):
    """`send` carries a message over the simulated network; whoever was parked there looks again."""

    def __init__(
        self, num_ranks: int, hidden_size: int, top_k: int, *, network: SimNetwork
    ) -> None:
        super().__init__(num_ranks, hidden_size, top_k)
        self._network = network
        self._process_of: dict[Member, SimProcess] = {}
        self._host_of: dict[SimProcess, ExchangeHost] = {}
        self._held: list[tuple[Member, Member, Any, Any]] = []
        self._num_under_way: Counter[tuple[Member, Member]] = Counter()

    def attach(self, member: Member, process: SimProcess, host: ExchangeHost) -> None:
        self._process_of[member] = process
        self._host_of[process] = host

    def can_reach(self, source: Member, target: Member) -> bool:
        sender, receiver = self._process_of[source], self._process_of.get(target)
        if receiver is None or receiver.dead:
            return False
        return self._network.reachable(sender.host, receiver.host)

    def park(self) -> None:
        process = current_process.get()
        assert process is not None
        self._host_of[process].park_exchange()

    def send(self, source: Member, target: Member, place: Any, message: Any) -> None:
        if source == target:
            super().send(source, target, place, message)
            return
        receiver = self._process_of.get(target)
        if receiver is None or receiver.dead:
            return
        if not self.can_reach(source, target):
            self._held.append((source, target, place, message))
            return
        late_s = self._network.latency_s()
        if self._network.rng.random() < SLOW_MESSAGES:
            late_s += self._network.rng.uniform(0.005, 0.2)
        self._num_under_way[source, target] += 1
        self._network.loop.call_later(late_s, self._deliver, source, target, place, message)

    def is_under_way(self, source: Member, target: Member) -> bool:
        return self._num_under_way[source, target] > 0

    def heal(self) -> None:
        """A write that was under way when the link was cut lands late: stale, to be ignored."""
        held, self._held = self._held, []
        for each in held:
            self.send(*each)

    def _deliver(self, source: Member, target: Member, place: Any, message: Any) -> None:
        self._num_under_way[source, target] -= 1
        receiver = self._process_of.get(target)
        if receiver is not None and not receiver.dead:
            if self.holds_later(source, target, place):
                return  # a buffer is written again only once the write before has ended
            LocalHub.send(self, source, target, place, message)
            self._host_of[receiver].arrived()
