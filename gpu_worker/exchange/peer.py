"""Both directions of the traffic with one peer: the messages that it has written to this rank's
regions, and the outbox to it. The outbox is replaced when the endpoint opens the link again."""

from __future__ import annotations

from gpu_worker.exchange.links import TransferEndpoint
from gpu_worker.exchange.message import (
    FIRST_DISPATCH_BUFFER,
    ExchangePhase,
    Header,
    MessageBuffer,
    read_header,
)
from gpu_worker.exchange.message import is_of_later_epoch as is_later
from gpu_worker.exchange.outbox import Outbox
from gpu_worker.exchange.regions import Region
from gpu_worker.exchange.shared_words import has_stamp, wait_for_stamp
from shared.types import Epoch, Member

_NUM_YIELDS = 0
_SLEEP_NS = 1_000_000


class Peer:
    """One peer of an exchange. Engine thread only."""

    def __init__(self, endpoint: TransferEndpoint, member: Member) -> None:
        self.member = member
        self.rank = member.rank
        self.header = Header(0, 0, 0, False)
        """The header of the peer's last dispatch."""
        self._endpoint = endpoint
        self._layout = endpoint.layout
        self._regions: tuple[Region, ...] = ()
        self._outbox: Outbox | None = None
        self._message_buffer: MessageBuffer | None = None

    @property
    def outbox(self) -> Outbox:
        assert self._outbox is not None, f"no link to rank {self.member} was ever open"
        return self._outbox

    @property
    def message_buffer(self) -> MessageBuffer:
        """The buffer of the message that was found last."""
        assert self._message_buffer is not None, f"nothing from rank {self.member} was found"
        return self._message_buffer

    @property
    def rings(self) -> bool:
        """Whether the peer writes through shared memory, so that this rank can sleep until it
        does."""
        return bool(self._regions) and self._regions[0].is_mapped

    def sleep_until(self, index: int, stamp: int) -> bool:
        """Whether the message is there, after a short sleep at most. Only if it `rings`."""
        region = self._regions[0]
        head = region.message_buffers[index].head
        return wait_for_stamp(head, stamp, region.bell, _NUM_YIELDS, _SLEEP_NS)

    def find_dispatch(self, index: int, stamp: int) -> bool:
        header = self._find(index, ExchangePhase.DISPATCH, stamp)
        if header is None:
            return False
        self.header = header
        return True

    def find_combine(self, index: int, stamp: int, num_rows: int) -> bool:
        header = self._find(index, ExchangePhase.COMBINE, stamp)
        return header is not None and header.num_rows == num_rows

    def _find(self, index: int, phase: ExchangePhase, stamp: int) -> Header | None:
        for region in self._regions:
            message_buffer = region.message_buffers[index]
            if message_buffer.stamps[0] == stamp and has_stamp(message_buffer.head, stamp):
                header = read_header(message_buffer, self._layout, phase, stamp, self.member)
                if header is not None:
                    self._message_buffer = message_buffer
                    return header
        return None

    def has_left(self, epoch: Epoch) -> bool:
        """Whether the peer has sent the first dispatch of a later epoch."""
        for region in self._regions:
            message_buffer = region.message_buffers[FIRST_DISPATCH_BUFFER]
            head = message_buffer.stamps[0]
            if is_later(head, epoch) and read_header(
                message_buffer, self._layout, ExchangePhase.DISPATCH, head, self.member
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
