"""Where the messages to and from all peers of an exchange are, as arrays for the compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_worker.exchange.message import NUM_MESSAGE_BUFFERS
from gpu_worker.exchange.peer import Peer
from gpu_worker.exchange.regions import REGIONS_READ_MAX, Region
from gpu_worker.exchange.traffic import PEER


class PeerTable:
    """`peers` in the order of ranks. Engine thread only. Shape letters: those of `traffic`; 4
    message buffers."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        """Every peer's link is open."""
        self.peers = peers
        self.peer_P = np.zeros(len(peers), dtype=PEER)
        self.heads_out_4P = np.zeros((NUM_MESSAGE_BUFFERS, len(peers)), dtype=np.int64)
        self.heads_4PG = np.zeros(
            (NUM_MESSAGE_BUFFERS, len(peers), REGIONS_READ_MAX), dtype=np.int64
        )
        self.over_network: list[int] = []
        """The peers whose messages `Outbox.commit` sends."""
        self.rings = False
        """Whether all peers ring after their messages."""
        self._regions: list[tuple[Region, ...]] = []
        self.update()

    def update(self) -> None:
        """A link may have been opened anew, or a region given or mapped."""
        for p, peer in enumerate(self.peers):
            self._regions.append(peer.regions)
            peer.describe(self.peer_P[p], self.heads_out_4P[:, p], self.heads_4PG[:, p])
        self.over_network = np.flatnonzero(self.peer_P["bell_out"] == 0).tolist()
        self.rings = bool((self.peer_P["bell"] != 0).all())

    def release_regions(self) -> None:
        """What was found is read no more. Until then its region must not be freed, even if the peer
        writes to other ones by now."""
        if len(self._regions) > len(self.peers):
            del self._regions[: -len(self.peers)]
