"""A stranger at Mooncake's ports. `python -m tests.support.data_port_attack UID PORT…` acts as that
user: it says to each port what Mooncake would obey or stumble over, and prints what it was told, by
port, in hexadecimal. Then it holds connections until its input ends."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - another user may not be able to read modules
import json
import os
import random
import socket
import struct
import sys

CONNECTIONS_HELD = 200
ABORTING = (b"[]", b"[" * 1500, b'{"local_nic_path":{}}', b'{"name":[]}')
"""JSON over which Mooncake throws, where nobody catches."""
HURRIED = 20
"""Connections that are closed before Mooncake can have looked whose they are."""
READ, WRITE = 0, 1


def rpc_frame(kind: int, body: bytes) -> bytes:
    """A message to the port on which Mooncake's engines exchange what they know."""
    return struct.pack("<QB", len(body) + 1, kind) + body


def data_frame(opcode: int, address: int, size: int) -> bytes:
    return struct.pack("<QQB7x", size, address, opcode)


def messages() -> list[bytes]:
    draw = random.Random(7)
    lengths = (0, 1, 2**20, 2**20 + 1, 2**31, 2**63, 2**64 - 1)
    found = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]
    found += [draw.randbytes(draw.randrange(1, 4096)) for _ in range(4)]
    found += [struct.pack(order, length) for order in ("<Q", ">Q") for length in lengths]
    found += [
        data_frame(opcode, address, size)
        for opcode in (READ, WRITE, 255)
        for address in (0, 1, 2**47, 2**64 - 1)
        for size in (1, 2**40, 2**64 - 1)
    ]
    found += [rpc_frame(1, b"{}")]  # asks for addresses of memory
    return found + [rpc_frame(kind, body) for body in ABORTING for kind in (0, 2)]


def say(port: int, message: bytes) -> bytes:
    """All that it answers, if it lets this process in."""
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
    except OSError:
        pass
    return answer


def say_and_leave(port: int, message: bytes, *, reset: bool) -> None:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(message)
            if reset:
                option = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
    except OSError:
        pass


def main() -> None:
    os.setuid(int(sys.argv[1]))
    ports = [int(port) for port in sys.argv[2:]]
    told: dict[int, list[str]] = {port: [] for port in ports}
    for port in ports:
        for number in range(HURRIED):
            say_and_leave(port, rpc_frame(0, ABORTING[0]), reset=number % 2 == 0)
        told[port] = [answer.hex() for m in messages() if (answer := say(port, m))]
    held = [
        socket.create_connection(("127.0.0.1", port), timeout=5)
        for port in ports
        for _ in range(CONNECTIONS_HELD // len(ports))
    ]
    print(json.dumps(told), flush=True)
    sys.stdin.read()
    del held


if __name__ == "__main__":
    main()
