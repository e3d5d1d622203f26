"""What Mooncake's elastic Buffer asks of a store when it connects ranks, answered from the peers'
records: each rank puts its handles into its own record, under its lease, so that no rank hosts a
store and none waits for another to call. Nothing that came from elsewhere is unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta

from shared.records import ExchangeHandles
from shared.types import RankId


class HandleStore:
    """The Buffer names keys `MOONCAKE_EP/SOURCE/TARGET`."""

    def __init__(self) -> None:
        self._handles: dict[RankId, ExchangeHandles] = {}
        self._mapped: dict[RankId, ExchangeHandles] = {}

    def set_handles(self, rank: RankId, handles: ExchangeHandles) -> None:
        """Of the life that is to be met under this number from now on."""
        self._handles[rank] = handles

    def note_mapped(self, rank: RankId) -> None:
        """The buffer of the life that is to be met under this number is mapped."""
        self._mapped[rank] = self._handles[rank]

    def note_unmapped(self, rank: RankId) -> None:
        self._mapped.pop(rank, None)

    def is_mapped(self, rank: RankId, handles: ExchangeHandles) -> bool:
        """Whether the buffer mapped under this number is exactly this one."""
        return self._mapped.get(rank) == handles

    def set(self, key: str, value: bytes) -> None:
        """The own record says it already."""

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """A rank is connected only after its record has been seen."""

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [_envelope(self._handles[RankId(int(key.split("/")[1]))]) for key in keys]

    def delete_key(self, key: str) -> bool:
        return True


def _envelope(handles: ExchangeHandles) -> bytes:
    """As the Buffer packs its own."""
    metadata = (
        handles.address,
        handles.remote_key,
        handles.subnet_prefix,
        handles.interface_id,
        handles.queue_pairs,
        handles.local_ids,
        handles.ipc_handle,
    )
    return pickle.dumps((handles.host, metadata))
