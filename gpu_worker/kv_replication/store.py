"""All replicas that peers have stored on this rank: the regions that they write to, and the blocks
that are known to be there. Implements `engine.kv_replication.ReplicaStore`. Does no network I/O.

    given ──newer generation, or 60 s without a record──▶ quarantine ──180 s──▶ released
      ▲ a slot is known from KvReplicasStored to DropKvReplicas

The blocks of a region in quarantine are no longer known, but late writes may still arrive in it, as
`exchange/regions.py` explains. They do no harm as long as the memory exists."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from gpu_worker.engine.kv_replication import Bytes
from gpu_worker.exchange.mooncake_engine import TransferEngine
from gpu_worker.exchange.regions import QUARANTINE_S
from gpu_worker.kv_replication.block_form import BlockForm
from gpu_worker.kv_replication.block_tags import TAG_BYTES, BlockTags
from gpu_worker.kv_replication.region import ReplicaRegion
from shared.types import Member
from shared.wire import DropKvReplicas, KvReplicasStored, OpenKvReplicaRegion

log = structlog.get_logger()

RETENTION_S = 60.0
"""How long the blocks of a source are kept after its record is gone. Its sessions are moved within
seconds, but may wait here behind long prompts."""

REGIONS_MAX = 8
"""Of one source, those in quarantine included. A link that breaks again and again waits then."""
NAME_BYTES_MAX = 64


class _Place(NamedTuple):
    region: ReplicaRegion
    slot: int
    tag: bytes


class Dropping(NamedTuple):
    """Slots that are no longer known, but may still be read by a caller that found them before."""

    region: ReplicaRegion | None
    slots: Sequence[int]

    def is_done(self) -> bool:
        return self.region is None or not any(self.region.is_read(slot) for slot in self.slots)


class StoredReplicas:
    """Any thread. `region_bytes` is what each source gets. The region of a dead incarnation that is
    still kept is not counted when the rank's next incarnation asks for one: over TCP memory is used
    only when it is written, and two regions of one rank are rarely both full."""

    def __init__(
        self, engine: TransferEngine, form: BlockForm, tags: BlockTags, region_bytes: int
    ) -> None:
        self.num_rejected = 0
        """Replicas that did not fit their tags when they were to be used."""
        self._engine = engine
        self._tags = tags
        self._form = form
        self._num_slots = region_bytes // form.block_bytes
        self._lock = threading.Lock()
        self._regions: dict[Member, ReplicaRegion] = {}
        self._names: dict[ReplicaRegion, dict[int, bytes]] = {}  # by slot; regions in use only
        self._places: dict[bytes, tuple[_Place, ...]] = {}
        self._present: set[Member] = set()
        self._gone: dict[Member, float] = {}
        self._quarantine: list[tuple[float, Member, ReplicaRegion]] = []

    def give(self, request: OpenKvReplicaRegion, now: float) -> ReplicaRegion:
        """A new region; the source's older one is retired. May block. Raises ValueError if the
        source's blocks cannot be loaded here, the request is late or the source has had
        REGIONS_MAX, MemoryError."""
        self._check(request)
        # Outside the lock: the engine thread must not wait for a registration.
        region = ReplicaRegion(
            self._engine,
            generation=request.generation,
            num_slots=self._num_slots,
            block_bytes=self._form.block_bytes,
        )
        with self._lock:
            older = self._regions.get(request.source)
            is_late = older is not None and older.generation >= request.generation
            if not is_late:
                self._retire(request.source, now)
                self._regions[request.source] = region
                self._names[region] = {}
                if request.source not in self._present:
                    self._gone.setdefault(request.source, now)
        if is_late:
            region.unregister()
            raise ValueError(f"{request.source} has asked for a later generation already")
        return region

    def keep(self, kept: KvReplicasStored) -> None:
        """Makes slots known, unless they are of an older generation. Raises ValueError if this rank
        has no region of the source, or if the message is inconsistent."""
        with self._lock:
            region = self._region_of(kept.source, kept.generation)
            if region is None:
                return
            names = self._names[region]
            if len(kept.slots) != len(kept.names) or len(set(kept.slots)) != len(kept.slots):
                raise ValueError(f"{kept.source} does not name each slot once")
            if any(not 0 <= slot < region.num_slots or slot in names for slot in kept.slots):
                raise ValueError(f"{kept.source} has written where it must not")
            if any(len(name) > NAME_BYTES_MAX for name in kept.names):
                raise ValueError(f"{kept.source} has blocks with long names")
            if [len(tag) for tag in kept.tags] != [TAG_BYTES] * len(kept.slots):
                raise ValueError(f"{kept.source} does not give each block its tag")
            for slot, name, tag in zip(kept.slots, kept.names, kept.tags, strict=True):
                names[slot] = name
                self._places[name] = (*self._places.get(name, ()), _Place(region, slot, tag))

    def drop(self, request: DropKvReplicas) -> Dropping:
        """`find` no longer returns these slots. Raises ValueError as `keep` does."""
        with self._lock:
            region = self._region_of(request.source, request.generation)
            if region is None:
                return Dropping(None, ())
            if any(not 0 <= slot < region.num_slots for slot in request.slots):
                raise ValueError(f"{request.source} drops slots that it does not have")
            for slot in request.slots:
                self._forget(region, slot)
            return Dropping(region, request.slots)

    def find(self, name: bytes) -> Bytes | None:
        """See `engine.kv_replication.ReplicaStore`. The content is a copy: whoever reaches the data
        network can write to the slot even after it was checked. No source writes to a slot while it
        is being copied."""
        while True:
            with self._lock:
                places = self._places.get(name)
                if not places:
                    return None
                place = places[0]
                view = place.region.read(place.slot)
            content = view.copy()
            if self._tags.is_genuine(name, content, place.tag):
                return content
            with self._lock:
                self._reject(name, place)

    def _reject(self, name: bytes, place: _Place) -> None:
        self.num_rejected += 1
        log.error("kv_replica_rejected", name=name.hex(), slot=place.slot)
        if self._names.get(place.region, {}).get(place.slot) == name:
            self._forget(place.region, place.slot)

    def on_member_present(self, source: Member) -> None:
        """The source has a record."""
        with self._lock:
            self._present.add(source)
            self._gone.pop(source, None)

    def on_member_gone(self, source: Member, now: float) -> None:
        """The source's record is gone."""
        with self._lock:
            self._present.discard(source)
            if source in self._regions:
                self._gone.setdefault(source, now)

    def on_all_gone(self, now: float) -> None:
        """Nobody knows who is present: until a source's record is seen again it counts as gone."""
        with self._lock:
            self._present.clear()
            for source in self._regions:
                self._gone.setdefault(source, now)

    def sweep(self, now: float) -> None:
        """Forgets the blocks of sources that are gone for `RETENTION_S`, and releases regions whose
        quarantine has ended."""
        with self._lock:
            for source in [s for s, at in self._gone.items() if now - at >= RETENTION_S]:
                del self._gone[source]
                self._retire(source, now)
            due = [region for at, _, region in self._quarantine if now - at >= QUARANTINE_S]
            self._quarantine = [
                entry for entry in self._quarantine if now - entry[0] < QUARANTINE_S
            ]
        for region in due:
            region.unregister()

    def _check(self, request: OpenKvReplicaRegion) -> None:
        ours = self._form
        if (request.layout, request.block_bytes) != (ours.layout, ours.block_bytes):
            raise ValueError(
                f"blocks of {request.block_bytes} bytes ({request.layout}) are of no use where "
                f"they have {ours.block_bytes} ({ours.layout})"
            )
        if self._num_slots == 0:
            raise ValueError(f"no memory for even one block of {ours.block_bytes} bytes")
        with self._lock:
            num_had = sum(source == request.source for _, source, _ in self._quarantine)
        if num_had + 1 >= REGIONS_MAX:
            raise ValueError(
                f"{request.source} has had {REGIONS_MAX} regions; wait for some to end"
            )

    def _region_of(self, source: Member, generation: int) -> ReplicaRegion | None:
        """None if a later generation has replaced it. Raises ValueError if there is none."""
        region = self._regions.get(source)
        if region is None or region.generation < generation:
            raise ValueError(f"this rank keeps nothing of {source}, generation {generation}")
        return region if region.generation == generation else None

    def _forget(self, region: ReplicaRegion, slot: int) -> None:
        name = self._names[region].pop(slot, None)
        if name is None:
            return
        places = tuple(
            place for place in self._places[name] if (place.region, place.slot) != (region, slot)
        )
        if places:
            self._places[name] = places
        else:
            del self._places[name]

    def _retire(self, source: Member, now: float) -> None:
        region = self._regions.pop(source, None)
        if region is None:
            return
        for slot in list(self._names[region]):
            self._forget(region, slot)
        del self._names[region]
        self._quarantine.append((now, source, region))
