"""`python -m shared.health_check URL` for a container's health check: exits with 0 if
`http://HOST:PORT/PATH` answers 200, or if at `rank://HOST:PORT` a rank listens whose event loop
runs. It needs no secret: it asks who is there, and goes.

Containers run it every few seconds for ever, on the CPUs that ranks compute with. So it imports
nothing but what opens a socket, and a rank gets a frame that was encoded before: the first one of
any connection, as the first release sends it. A test compares it with `shared.wire`."""

from __future__ import annotations

import socket
import sys

TIMEOUT_S = 3.0
ANSWER_BYTES_MAX = 1 << 16
HELLO = (
    b"\x00\x00\x00t\x92\xa5Hello\x87\xa4role\xa3cli\xa4name\xabhealthcheck\xa8instance\xa0"
    b"\xa5nonce\xc4\x00\xa8name_key\xc4\x00\xa6member\xc0\xa7release\x83\xa7version\xa30.1"
    b"\xa8protocol\x01\xacprotocol_min\x01"
)
CHALLENGE = b"\x92\xa9Challenge"  # how the answer's body begins, after four bytes of its length


def is_healthy(url: str) -> bool:
    """Raises ValueError for a URL of another kind."""
    scheme, _, rest = url.partition("://")
    address, slash, path = rest.partition("/")
    host, _, port = address.rpartition(":")
    if scheme not in ("http", "rank") or not host or not port.isdecimal():
        raise ValueError(f"{url}: pass http://HOST:PORT/PATH or rank://HOST:PORT")
    request = f"GET {slash}{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S) as connection:
            if scheme == "rank":
                connection.sendall(HELLO)
                return _read(connection, 4 + len(CHALLENGE))[4:] == CHALLENGE
            connection.sendall(request.encode())
            # To the end: who closes with unread bytes resets the connection.
            return _read(connection, ANSWER_BYTES_MAX).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """That many, or fewer if the connection ends before. Raises OSError."""
    answer = b""
    while len(answer) < num_bytes and (piece := connection.recv(num_bytes - len(answer))):
        answer += piece
    return answer


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    return 0 if is_healthy(sys.argv[1]) else 1


if __name__ == "__main__":
    sys.exit(main())
