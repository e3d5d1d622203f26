"""Both directions of the traffic with one peer: the messages it has left in this rank's regions,
and the outbox towards it, which follows the link when the endpoint opens it anew."""

from __future__ import annotations

from typing import Protocol

from gpu_worker.exchange.message import (
    FIRST_DISPATCH_BUFFER,
    ExchangePhase,
    Header,
    MessageBuffer,
    MessageLayout,
    read_header,
)
from gpu_worker.exchange.message import is_of_later_epoch as is_later
from gpu_worker.exchange.outbox import Link, Outbox
from gpu_worker.exchange.regions import Region
from shared.types import Epoch, Member


class PeerLinks(Protocol):
    """What an exchange needs of its rank's endpoint. Calls must be cheap."""

    def link(self, target: Member) -> Link | None: ...

    def regions_of(self, source: Member) -> tuple[Region, ...]: ...

    def mark_broken(self, link: Link) -> None: ...

    def outbox(self, link: Link) -> Outbox: ...

    def discard(self, outbox: Outbox) -> None: ...


class Peer:
    """Engine thread only."""

    def __init__(self, endpoint: PeerLinks, layout: MessageLayout, member: Member) -> None:
        self.member = member
        self.rank = member.rank
        self.header = Header(0, 0, 0, False)
        """Of the peer's last dispatch."""
        self._endpoint = endpoint
        self._layout = layout
        self._regions: tuple[Region, ...] = ()
        self._outbox: Outbox | None = None
        self._message_buffer: MessageBuffer | None = None

    @property
    def outbox(self) -> Outbox:
        assert self._outbox is not None, f"no link to rank {self.member} was ever open"
        return self._outbox

    @property
    def message_buffer(self) -> MessageBuffer:
        """Of the message found last."""
        assert self._message_buffer is not None, f"nothing from rank {self.member} was found"
        return self._message_buffer

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
            if message_buffer.stamps[0] == stamp:
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
        """Why the link is broken, or nothing. The endpoint is told, so that it is opened anew."""
        if self._outbox is None or not self._outbox.broken:
            return ""
        self._endpoint.mark_broken(self._outbox.link)
        return self._outbox.broken

    def maintain(self) -> None:
        """Moves own writes on; sends again what was lost once the link is open anew."""
        if self._outbox is not None:
            self._outbox.progress()
        self._renew(send_again=True)

    def drain(self) -> bool:
        """Whether the link is open and carries nothing of an earlier epoch any more."""
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
