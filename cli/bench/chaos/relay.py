"""Carries frames between two interfaces, each after a delay, and loses a fraction of them. Kernels
need `netem` for this, which many lack. It runs as a script, in a namespace of its own."""

from __future__ import annotations

import heapq
import random
import select
import socket
import struct
import sys
import time

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_OUTGOING = 263, 15, 4
_FRAME_BYTES = 1 << 17
_PER_WAKE = 64


def main() -> None:
    """`relay.py INTERFACE INTERFACE DELAY_S LOSS`: until it is killed."""
    ends = [_open(name) for name in sys.argv[1:3]]
    delay_s, loss = float(sys.argv[3]), float(sys.argv[4])
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, end, frame = heapq.heappop(waiting)
            try:
                ends[end].send(frame)
            except OSError:  # the interface is down, or its queue is full: lost, as on a real link
                continue
        timeout_s = max(0.0, waiting[0][0] - now) if waiting else None
        ready, _, _ = select.select(ends, (), (), timeout_s)
        for source in ready:
            for frame in _frames(source):
                if random.random() >= loss:
                    number += 1
                    entry = (time.monotonic() + delay_s, number, 1 - ends.index(source), frame)
                    heapq.heappush(waiting, entry)


def _open(name: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    # Frames between virtual interfaces are large and have no checksums yet: this header says so.
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, struct.pack("i", 1))
    end.bind((name, _ETH_P_ALL))
    end.setblocking(False)
    return end


def _frames(source: socket.socket) -> list[bytes]:
    """What has come in; not what went out there."""
    found = []
    for _ in range(_PER_WAKE):
        try:
            frame, address = source.recvfrom(_FRAME_BYTES)
        except OSError:
            break
        if address[2] != _PACKET_OUTGOING:
            found.append(frame)
    return found


if __name__ == "__main__":
    main()
