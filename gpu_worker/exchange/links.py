"""A rank's endpoint: the regions that it gives to peers, and the links that it has opened: over
Mooncake or, between ranks of one host, through memory that both map.

Mooncake's first contact with a stopped process blocks for a minute, and blocks writes to healthy
peers as well. So a link is opened before the peer is needed, on a thread of its own, and only after
the peer has answered a Ping on the control connection, which the caller ensures. Any thread may
call the endpoint.
"""

from __future__ import annotations

import copy
import threading

import numpy as np
import structlog
from numpy.typing import NDArray

from gpu_worker.exchange.connect_write import close_after_exit, connect_write
from gpu_worker.exchange.memory_outbox import MemoryOutbox, mark_mapped
from gpu_worker.exchange.message import MessageLayout
from gpu_worker.exchange.mooncake_engine import Protocols, open_engine
from gpu_worker.exchange.outbox import Link, Outbox
from gpu_worker.exchange.regions import Quarantine, Region, Regions
from gpu_worker.exchange.replica_policy import ReplicaPolicy
from gpu_worker.exchange.shared_memory import open_shared_memory
from gpu_worker.exchange.shared_words import can_sleep_on_words
from gpu_worker.exchange.transfer_outbox import TransferOutbox, submit_connect_write
from shared.clock import Clock
from shared.records import RankRecord
from shared.types import GivenRegion, Member
from shared.wire import RegionOpened

log = structlog.get_logger()

_CONNECT_TIMEOUT_S = 5.0
_GRACE_S = 0.001


class TransferEndpoint:
    """That of one incarnation. `name` is the transfer name in the rank's record; no other engine
    ever gets it, but later incarnations of the process keep it (`renew`). Mooncake's engine is
    freed only when the process ends, because stopping it takes a second. Registered memory stays in
    quarantine, because late writes of peers must find it."""

    def __init__(
        self,
        host: str,
        layout: MessageLayout,
        clock: Clock,
        *,
        protocol: Protocols = Protocols.TCP,
        device: str = "",
        replica_policy: ReplicaPolicy = ReplicaPolicy.GATHER,
        shares_memory: bool = True,
    ) -> None:
        """`shares_memory`: uses memory links with peers that can be reached so. Raises
        ConfigError."""
        self.layout = layout
        self._shares_memory = shares_memory and can_sleep_on_words()
        self.replica_policy = replica_policy
        self._clock = clock
        self._protocol = protocol
        self._engine, self.name = open_engine(host, protocol, device)
        self._scratch = Region(self._engine, layout, 0)
        self._quarantine = Quarantine()
        self._begin_incarnation()

    def _begin_incarnation(self) -> None:
        self._regions = Regions(
            self._engine, self.layout, self._quarantine, shares_memory=self._shares_memory
        )
        self._lock = threading.Lock()
        self._links: dict[Member, Link] = {}
        self._control_addresses: dict[Member, tuple[str, int]] = {}
        self._generations: dict[Member, int] = {}

    def renew(self) -> TransferEndpoint:
        """The endpoint of this process's next incarnation: the same engine, and nothing else of
        this one. The regions of this one are quarantined: what peers wrote to it, and what it wrote
        itself, is read by nobody, however late it arrives. Call it when the engine has ended."""
        self._regions.retire_all(self._clock.now())
        renewed = copy.copy(self)
        renewed._begin_incarnation()
        return renewed

    def next_generation(self, target: Member) -> int:
        """The generation for the next OpenRegion to this peer: never the same one twice."""
        with self._lock:
            generation = self._generations.get(target, 0) + 1
            self._generations[target] = generation
            return generation

    def open_region(self, source: Member, generation: int) -> GivenRegion:
        """The region for a peer's OpenRegion. Raises ValueError if a later generation was given,
        MemoryError if the region cannot be registered or the source has had too many."""
        region = self._regions.give(source, generation, self._clock.now())
        return GivenRegion(region.address, region.nbytes, region.handle)

    def connect(self, region: RegionOpened, peer: RankRecord | None = None) -> None:
        """Opens the link to the region that a peer has given: through its memory if this process
        can open it, else over Mooncake. Blocks. Raises ValueError if the peer's layout differs,
        ConnectionError or TimeoutError if the first write did not succeed."""
        if region.nbytes != self.layout.region_bytes:
            raise ValueError(
                f"rank {region.target} keeps regions of {region.nbytes} bytes, not "
                f"{self.layout.region_bytes}: the ranks' models or limits differ"
            )
        link = Link(
            target=region.target,
            generation=region.generation,
            transfer_name=region.transfer_name,
            address=region.address,
            memory=self._open_memory(region),
        )
        if link.memory is None:
            self._write_first(link)
        else:
            mark_mapped(link.memory)
        with self._lock:
            if peer is not None:
                address = (peer.control_host, peer.control_port)
                self._control_addresses[link.target] = address
            current = self._links.get(link.target)
            if current is None or current.generation < link.generation:
                self._links[link.target] = link

    def _open_memory(self, region: RegionOpened) -> NDArray[np.uint8] | None:
        """None if it is of another host, another user or another PID namespace."""
        if region.memory is None or not self._shares_memory:
            return None
        try:
            return open_shared_memory(region.memory, region.nbytes)
        except OSError as error:
            log.info("no_memory_link", peer=str(region.target), detail=str(error))
            return None

    def _write_first(self, link: Link) -> None:
        """Raises ConnectionError, TimeoutError."""
        attempt = _ConnectAttempt(self._clock.now() + _CONNECT_TIMEOUT_S)
        # A daemon thread: if Mooncake blocks for a minute, nobody has to wait for it.
        threading.Thread(
            target=self._open, args=(link, attempt), name=f"open-{link.target}", daemon=True
        ).start()
        if not attempt.ended.wait(_CONNECT_TIMEOUT_S + _GRACE_S):
            raise TimeoutError(f"the first write to rank {link.target} did not come to an end")
        if attempt.error:
            raise ConnectionError(f"the first write to rank {link.target} {attempt.error}")

    def is_open(self, target: Member) -> bool:
        """Whether this rank can write to the peer. Becomes false when a write fails; then the link
        must be opened again, with the next generation."""
        return target in self._links

    @property
    def memory_links(self) -> tuple[Member, ...]:
        """The peers to which this rank writes through shared memory."""
        with self._lock:
            return tuple(sorted(m for m, link in self._links.items() if link.memory is not None))

    def link(self, target: Member) -> Link | None:
        return self._links.get(target)

    def regions_of(self, source: Member) -> tuple[Region, ...]:
        return self._regions.of(source)

    def mark_broken(self, link: Link) -> None:
        with self._lock:
            if self._links.get(link.target) == link:
                del self._links[link.target]

    def forget(self, member: Member) -> None:
        """The member's record is gone. Closes its link and quarantines its regions."""
        with self._lock:
            link = self._links.pop(member, None)
            control_address = self._control_addresses.pop(member, None)
        self._regions.retire(member, self._clock.now())
        if link is not None and link.memory is None and control_address is not None:
            close_after_exit(
                self._engine,
                lambda: submit_connect_write(self._engine, self._scratch, link),
                self._clock,
                control_address,
            )

    def sweep(self) -> None:
        """Releases memory whose quarantine has ended. To be called every few seconds."""
        self._quarantine.sweep(self._clock.now())

    def outbox(self, link: Link) -> Outbox:
        if link.memory is not None:
            return MemoryOutbox(self.layout, link, link.memory)
        return TransferOutbox(self._engine, self.layout, link, self._protocol)

    def discard(self, outbox: Outbox) -> None:
        """Releases this outbox as soon as no write reads it any more."""
        self._quarantine.put(outbox, self._clock.now())

    def _open(self, link: Link, attempt: _ConnectAttempt) -> None:
        def submit() -> int:
            return submit_connect_write(self._engine, self._scratch, link)

        attempt.error = connect_write(self._engine, submit, self._clock, attempt.until)
        attempt.ended.set()


class _ConnectAttempt:
    """The result that the opening thread hands to the thread that waits for it."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.ended = threading.Event()
        self.error = ""
