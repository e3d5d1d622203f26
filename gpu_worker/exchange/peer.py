"""Both directions of the traffic with one peer: the messages that it has written to this rank's
regions, and the outbox to it. The outbox is replaced when the endpoint opens the link again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_worker.exchange.header import read_header
from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import FIRST_DISPATCH_BUFFER, ExchangePhase
from gpu_worker.exchange.message import is_of_later_epoch as is_later
from gpu_worker.exchange.outbox import Outbox
from gpu_worker.exchange.regions import Region
from shared.types import Epoch, Member

_Longs = NDArray[np.int64]


class Peer:
    """One peer of an exchange. Engine thread only."""

    def __init__(self, endpoint: TransferEndpoint, member: Member, own_1: NDArray[np.void]) -> None:
        """`own_1` is this rank's `header.OWN`."""
        self.member = member
        self.rank = member.rank
        self._endpoint = endpoint
        self._own_1 = own_1
        self._regions: tuple[Region, ...] = ()
        self._outbox: Outbox | None = None

    @property
    def regions(self) -> tuple[Region, ...]:
        """Those that it may have written to, the newest first."""
        return self._regions

    @property
    def outbox(self) -> Outbox:
        assert self._outbox is not None, f"no link to rank {self.member} was ever open"
        return self._outbox

    def describe(self, record: np.void, heads_out_4: _Longs, heads_4G: _Longs) -> None:
        """Fills in where messages to and from the peer are: the fields of `traffic.PEER`, and the
        addresses by index."""
        record["rank"], record["incarnation"] = self.member.rank, self.member.incarnation
        record["bell_out"], heads_out_4[:] = self.outbox.bell, self.outbox.heads
        heads_4G[:] = 0
        for g, region in enumerate(self._regions):
            heads_4G[:, g] = [each.head for each in region.message_buffers]
        rings = bool(self._regions) and self._regions[0].is_mapped
        record["bell"] = self._regions[0].bell if rings else 0

    def has_left(self, epoch: Epoch) -> bool:
        """Whether the peer has sent the first dispatch of a later epoch."""
        for region in self._regions:
            message_buffer = region.message_buffers[FIRST_DISPATCH_BUFFER]
            stamp = message_buffer.head_stamp
            if is_later(stamp, epoch) and read_header(
                message_buffer, self._own_1, ExchangePhase.DISPATCH, stamp, self.member
            ):
                return True
        return False

    def report_failure(self) -> str:
        """Why the link is broken, or an empty string. Marks it broken at the endpoint, so that it
        is opened again."""
        if self._outbox is None or not self._outbox.broken:
            return ""
        self._endpoint.mark_broken(self._outbox.link)
        return self._outbox.broken

    def maintain(self) -> None:
        """Advances this rank's writes. Sends lost messages again once the link is open again."""
        if self._outbox is not None:
            self._outbox.progress()
        self._renew(send_again=True)

    def drain(self) -> bool:
        """Advances the link to a new epoch. True once it is open and no write of an earlier epoch
        is pending."""
        if self._outbox is not None:
            if self._outbox.progress():
                return False
            self._outbox.forget_failed()
            self.report_failure()
        self._renew(send_again=False)
        return bool(self._regions) and self._outbox is not None and not self._outbox.broken

    def close(self) -> None:
        if self._outbox is not None:
            self._endpoint.discard(self._outbox)
            self._outbox = None

    def _renew(self, *, send_again: bool) -> None:
        self._regions = self._endpoint.regions_of(self.member) or self._regions
        old, link = self._outbox, self._endpoint.link(self.member)
        if link is None or (old is not None and (old.link == link or old.progress())):
            return
        self._outbox = self._endpoint.outbox(link)
        if old is not None:
            if send_again:
                self._outbox.take_over(old)
            self._endpoint.discard(old)
