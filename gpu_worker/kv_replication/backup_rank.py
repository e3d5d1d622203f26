"""One incarnation of a backup rank, as seen by the source: which chains it is to store, which
blocks it was sent, and which are next. Which chain goes to which rank is decided by `writer`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from gpu_worker.engine.kv_replication import BlockCache, ReplicaChannel
from gpu_worker.kv_replication.replica_ledger import ReplicaLedger


class ReplicatedChain:
    """A running session's named blocks, from its first token on. The first `num_sent` of them are
    stored at its backup rank, or being sent."""

    __slots__ = ("blocks", "names", "num_sent")

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self.blocks: list[int] = []
        self.num_sent = 0

    @property
    def is_sent(self) -> bool:
        return self.num_sent == len(self.names)


class BackupRank:
    """Sends the blocks of each chain in order, because a block is of no use without those before
    it. Chains take turns, one block at a time."""

    def __init__(self, channel: ReplicaChannel) -> None:
        self.channel = channel
        self._ledger = ReplicaLedger(channel.num_slots)
        self._chains: dict[ReplicatedChain, None] = {}
        self._unsent: OrderedDict[ReplicatedChain, None] = OrderedDict()

    @property
    def chains(self) -> Iterable[ReplicatedChain]:
        return self._chains

    @property
    def is_full(self) -> bool:
        """It can take no further block until one of its sessions has ended."""
        return self._ledger.is_full

    @property
    def has_more(self) -> bool:
        """Whether something can be sent, now or soon."""
        return bool(self._unsent) and not self.is_full

    @property
    def is_settled(self) -> bool:
        """Whether no write and no drop is pending."""
        return self._ledger.is_settled

    def holds(self, chain: ReplicatedChain) -> bool:
        """Whether it stores at least the first block."""
        return chain.num_sent > 0 and self._ledger.is_known(chain.names[0])

    def want(self, chain: ReplicatedChain) -> None:
        """Queues the chain's blocks that are not sent yet."""
        self._chains[chain] = None
        if self._advance(chain):
            self._unsent.pop(chain, None)
        else:
            self._unsent[chain] = None

    def leave(self, chain: ReplicatedChain) -> None:
        del self._chains[chain]
        self._unsent.pop(chain, None)
        self._ledger.release(chain.names[: chain.num_sent])
        self._request_drops()

    def settle(self) -> None:
        """Takes the channel's confirmations of writes and drops."""
        self._ledger.note_known(self.channel.take_sent())
        self._ledger.note_dropped(self.channel.take_dropped())
        self._request_drops()

    def send_next(self, cache: BlockCache) -> bool:
        """Sends one block. False if none can be sent now."""
        if not self._ledger.has_free:
            return False
        for _ in range(len(self._unsent)):
            chain, _ = self._unsent.popitem(last=False)
            if self._advance(chain):
                continue
            self._unsent[chain] = None
            name = chain.names[chain.num_sent]
            if not self._ledger.may_take(name):
                continue
            if (staging_buffer := self.channel.take_staging_buffer()) is None:
                self._unsent.move_to_end(chain, last=False)
                return False
            is_saved = cache.save(chain.blocks[chain.num_sent], staging_buffer)
            self.channel.send(staging_buffer, self._ledger.take(name), name, is_saved)
            chain.num_sent += 1
            self._request_drops()
            return True
        return False

    def _request_drops(self) -> None:
        if slots := self._ledger.pick_drops():
            self.channel.drop(slots)

    def _advance(self, chain: ReplicatedChain) -> bool:
        """Skips blocks that were sent for other chains. Whether none is left to send."""
        while not chain.is_sent and self._ledger.has(chain.names[chain.num_sent]):
            self._ledger.use(chain.names[chain.num_sent])
            chain.num_sent += 1
        return chain.is_sent
