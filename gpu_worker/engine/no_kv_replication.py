"""The replicator of a rank that neither sends KV replicas nor keeps any."""

from __future__ import annotations

from collections.abc import Sequence

from shared.types import Member, RankId, SessionId


class NoKvReplication:
    """Implements `kv_replication.KvReplicator`."""

    def use(self, others: Sequence[Member]) -> None:
        pass

    def restore(self, names: Sequence[bytes], blocks: Sequence[int]) -> int:
        return 0

    @property
    def num_rejected(self) -> int:
        return 0

    def offer(self, session: SessionId, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        pass

    def forget(self, session: SessionId) -> None:
        pass

    def backup_of(self, session: SessionId) -> RankId | None:
        return None

    def send_offered(self) -> bool:
        return False
