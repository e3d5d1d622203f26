"""The ranks that kernels of this rank wait for: which peers it has met, which of them the adopted
map names, and whom a newer epoch has given up. Knows no torch; the device is behind `MaskDevice`.

Theory of operation. Each kernel waits for what it needs of every rank whose bit is set in one mask
on the device, and reads that mask while it waits. A bit goes from 1 to 0 in two ways: `release`
clears it as soon as a verdict is known, and the kernel's own timeout clears it as a backstop. In
both cases the kernels of the step go on, and its result lacks something. The mask travels to the
host in the copy that brings the sampled tokens, so looking at it costs nothing. A step that lost a
bit raises StepAbandoned and is never delivered. So once a member of the adopted map is given up,
the steps in flight send no more tokens to experts: they only have to end.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpu_worker.cuda.ep.handles import HandleStore
from gpu_worker.cuda.ep.mappings import EpMappings, MappedBuffer
from gpu_worker.cuda.ep.members import EpMembers, MaskChange
from gpu_worker.exchange.worker_thread import Worker
from shared.clock import Clock
from shared.errors import DeviceLost, StepAbandoned
from shared.expert_map import ExpertMap
from shared.records import ExchangeHandles
from shared.types import Epoch, Member, RankId


class MaskDevice(Protocol):
    """The mask on the card. See `exchange.CudaMask`."""

    def clear(self, ranks: Sequence[RankId]) -> None:
        """Returns when running kernels see that these bits are 0. Any thread may call it."""
        ...

    def skip_experts(self) -> None:
        """No token that is routed from now on reaches an expert, until the table of slots is
        written again. Returns when running kernels see that. Any thread may call it."""
        ...

    def set(self, change: MaskChange) -> None:
        """Makes the mask what `change.active` says, and returns when it is so. No kernel may
        run. Only the engine thread calls it."""
        ...

    def drain(self) -> None:
        """Returns when no kernel of this process runs any more. Raises RuntimeError."""
        ...

    def check(self) -> None:
        """Raises RuntimeError if this process can use its card no more. Waits for no kernel. Any
        thread may call it."""
        ...


class RankMask:
    """`adopt` and `check_step` belong to the engine thread. Any thread may call `release`.
    `connect` belongs to another thread, beside running steps."""

    def __init__(
        self,
        member: Member,
        *,
        device: MaskDevice,
        buffer: MappedBuffer,
        handle_store: HandleStore,
        clock: Clock,
        mapping_worker: Worker,
        former: RankMask | None = None,
    ) -> None:
        """`mapping_worker` maps and unmaps peers' buffers. `former`: see `renew`."""
        self._device = device
        self._buffer = buffer
        self._handle_store = handle_store
        self._clock = clock
        self._mapping_worker = mapping_worker
        self._lock: threading.Lock = threading.Lock() if former is None else former._lock
        self._members: EpMembers = (
            EpMembers(member) if former is None else former._members.renewed(member)
        )
        self._mappings = EpMappings(
            self._members,
            self._lock,
            buffer,
            handle_store,
            clock,
            mapping_worker,
            self.check_device,
        )

    def end(self) -> None:
        """This incarnation is over: no kernel of it waits for anybody from now on, so that its
        graphs end, and no peer is met any more. Any thread. Raises DeviceLost."""
        with self._lock, self._device_errors():
            self._device.clear(self._members.end())

    def renew(self, member: Member) -> RankMask:
        """The mask of this process's next incarnation, on the same device and buffer. After `end`,
        and after the engine has ended. Returns when no kernel of this incarnation runs any more,
        so that nothing of it reaches a peer after the next one has registered. Raises
        DeviceLost."""
        self._mappings.call(self._isolate_for_good)
        return RankMask(
            member,
            device=self._device,
            buffer=self._buffer,
            handle_store=self._handle_store,
            clock=self._clock,
            mapping_worker=self._mapping_worker,
            former=self,
        )

    def _isolate_for_good(self) -> None:
        """On the worker: no peer is being mapped."""
        with self._device_errors():
            self._device.check()
            self._device.drain()
            with self._lock:
                self._device.set(self._members.isolate())

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DeviceLost(f"this process can use its card no more: {error}") from error

    def check_device(self) -> None:
        """Any thread. Raises DeviceLost if this process can use its card no more."""
        with self._device_errors():
            self._device.check()

    def connect(self, peer: Member, handles: ExchangeHandles) -> None:
        """Meets this incarnation. It stays masked until a map names it. Raises ConnectionError if
        the adopted map still names a former incarnation of its rank, or if its memory cannot be
        mapped, as that of a process that has just died. Raises DeviceLost if the own card fails."""
        self._mappings.connect(peer, handles)

    def is_connected(self, member: Member) -> bool:
        return self._members.is_connected(member)

    def release(self, dead: Collection[Member], epoch: Epoch) -> None:
        """Map `epoch` is without these members: kernels wait for them no longer. Safe at any
        moment. It returns when the running kernel can see it, and no step that has not completed
        by then will be delivered. Members that this rank has not met, or whose successors it has
        met already, change nothing. Of a step that will not be delivered the experts are skipped:
        write the table of slots after `adopt`, never before it."""
        with self._lock:
            given_up = self._members.give_up(dead, epoch)
            self._device.clear(given_up)
            if self._members.delivers_no_more():
                self._device.skip_experts()

    def map_members(self, expert_map: ExpertMap) -> Future[None]:
        """Before `adopt` of the same map: with nothing in flight, and for a map with joiners with
        nothing in flight on any member. Ends when each member that can be mapped is. Its result may
        raise DeviceLost."""
        return self._mappings.map_members(expert_map)

    def adopt(self, expert_map: ExpertMap) -> None:
        """Between steps, with nothing in flight. A member whose buffer is not mapped stays masked,
        so that no step is delivered."""
        with self._lock:
            self._device.set(self._members.adopt(expert_map))

    def isolate(self) -> None:
        """Between steps: until the next `adopt`, kernels wait for nobody and send to nobody. One
        such graph wipes what others have sent."""
        with self._lock:
            self._device.set(self._members.isolate())

    def lost_members(self, mask_R: NDArray[np.int32]) -> list[Member]:
        """`mask_R`, int32 `[R]`, as a graph has left it. Members that it lacks although neither a
        verdict nor a newer map has removed them."""
        with self._lock:
            return self._members.lost_unexplained(mask_R)

    def check_step(self, mask_R: NDArray[np.int32]) -> None:
        """`mask_R`, int32 `[R]`, as the completed step has left it. Raises StepAbandoned if the
        step lacked a member."""
        if lost := self._members.lost_ranks(mask_R):
            raise StepAbandoned(f"ranks {lost} left in a step of epoch {self._members.epoch}")
