"""Sends KV replicas of this rank's running sessions to other ranks, each session to one of them,
and restores replicas that others have stored here. The channels do the I/O."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from gpu_worker.engine.kv_replication import BlockCache, ReplicaEndpoint
from gpu_worker.kv_replication.backup_rank import BackupRank, ReplicatedChain
from shared.types import Member, RankId, SessionId

BLOCKS_PER_PUMP = 8
"""A CPU rank's block is some 130 KB and is saved in 20 µs, while its peers wait for it. So few
blocks lengthen no step noticeably, and they are as many as 128 decoding sessions fill in one
step."""


class ReplicaWriter:
    """Implements `engine.kv_replication.KvReplicator`. A session's backup rank is a member of the
    adopted map with an open channel, on another node if possible. Sessions are assigned in turn, so
    that those of a dead rank spread over the others. The assignment lasts until the channel closes
    or the rank leaves the map; then the session starts again with another rank. Blocks for which a
    full region has no slot are not sent."""

    def __init__(
        self,
        cache: BlockCache,
        endpoint: ReplicaEndpoint,
        *,
        rank: RankId,
        blocks_per_pump: int = BLOCKS_PER_PUMP,
    ) -> None:
        self._cache = cache
        self._endpoint = endpoint
        self._blocks_per_pump = blocks_per_pump
        self._last_rank = rank  # assigned last; at first this rank, so that ranks begin differently
        self._others: frozenset[Member] = frozenset()
        self._chains: dict[SessionId, ReplicatedChain] = {}
        self._target_of: dict[ReplicatedChain, BackupRank] = {}
        self._unassigned: dict[ReplicatedChain, None] = {}  # have no backup rank
        self._targets: dict[RankId, BackupRank] = {}
        # `send_offered` runs with every step, so it visits only these.
        self._unsettled: dict[BackupRank, None] = {}
        self._wanting: OrderedDict[BackupRank, None] = OrderedDict()  # may have blocks to send

    def use(self, others: Sequence[Member]) -> None:
        self._others = frozenset(others)
        for target in list(self._targets.values()):
            if target.channel.target not in self._others:
                self._lose(target)

    def restore(self, names: Sequence[bytes], blocks: Sequence[int]) -> int:
        num_restored = 0
        for name, block in zip(names, blocks, strict=True):
            if (content := self._endpoint.store.find(name)) is None:
                break
            self._cache.load(block, content)
            num_restored += 1
        return num_restored

    @property
    def num_rejected(self) -> int:
        return self._endpoint.store.num_rejected

    def offer(self, session: SessionId, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        chain = self._chains.get(session)
        if chain is None:
            chain = self._chains[session] = ReplicatedChain()
            self._unassigned[chain] = None
        chain.names += names
        chain.blocks += blocks
        if target := self._target_of.get(chain):
            target.want(chain)
            self._wanting[target] = None

    def forget(self, session: SessionId) -> None:
        chain = self._chains.pop(session, None)
        if chain is None:
            return
        self._unassigned.pop(chain, None)
        if target := self._target_of.pop(chain, None):
            target.leave(chain)
            self._unsettled[target] = None  # it may have to drop blocks
            self._wanting[target] = None  # others may have waited for these

    def backup_of(self, session: SessionId) -> RankId | None:
        chain = self._chains.get(session)
        target = self._target_of.get(chain) if chain else None
        if chain is None or target is None or not target.holds(chain):
            return None
        return target.channel.target.rank

    def send_offered(self) -> bool:
        for target in tuple(self._unsettled):
            if not target.channel.is_open:
                self._lose(target)
            elif target.channel.has_confirmations:
                target.settle()
                if target.is_settled:
                    del self._unsettled[target]
        if self._unassigned and self._others:
            self._assign_backups()
        if self._wanting:
            self._send()
        return bool(self._wanting)

    def _send(self) -> None:
        """One block to each backup rank in turn. Those that were served last come last next
        time."""
        waiting = deque(self._wanting)
        num_left = self._blocks_per_pump
        while waiting and num_left:
            target = waiting.popleft()
            if not target.channel.is_open:
                self._lose(target)
            elif target.send_next(self._cache):
                num_left -= 1
                waiting.append(target)
                self._wanting.move_to_end(target)
                self._unsettled[target] = None
            elif not target.has_more:
                del self._wanting[target]

    def _lose(self, target: BackupRank) -> None:
        del self._targets[target.channel.target.rank]
        self._unsettled.pop(target, None)
        self._wanting.pop(target, None)
        for chain in target.chains:
            chain.num_sent = 0
            del self._target_of[chain]
            self._unassigned[chain] = None

    def _assign_backups(self) -> None:
        targets = self._eligible()
        begin = sum(target.channel.target.rank <= self._last_rank for target in targets)
        in_turn = deque([*targets[begin:], *targets[:begin]])
        for chain in list(self._unassigned) if in_turn else ():
            target = next((t for t in in_turn if not t.is_full), in_turn[0])
            in_turn.rotate(-1 - in_turn.index(target))
            self._last_rank = target.channel.target.rank
            del self._unassigned[chain]
            self._target_of[chain] = target
            target.want(chain)
            self._wanting[target] = None

    def _eligible(self) -> list[BackupRank]:
        """Backup ranks that sessions may be assigned to, in the order of their ranks."""
        channels = [
            c
            for _, c in sorted(self._endpoint.channels().items())
            if c.target in self._others and c.num_slots and c.is_open
        ]
        elsewhere = [c for c in channels if c.is_on_other_node]
        targets: list[BackupRank] = []
        for channel in elsewhere or channels:
            target = self._targets.get(channel.target.rank)
            if target is not None and target.channel is not channel:
                self._lose(target)
                target = None
            if target is None:
                target = self._targets[channel.target.rank] = BackupRank(channel)
            targets.append(target)
        return targets
