"""`python -m node_agent.health HOST PORT`: exits with 0 if a rank listens there and its event loop
runs, for a container's health check. It needs no secret: it asks who is there, and goes."""

from __future__ import annotations

import asyncio
import sys

from shared.errors import WireError
from shared.handshake import HANDSHAKE_FRAME_BYTES_MAX
from shared.types import Role
from shared.wire import Challenge, Hello, encode, read_message

_TIMEOUT_S = 3.0


async def answers(host: str, port: int) -> bool:
    """Whether the rank's event loop answers the protocol. The control plane judges its engine."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(
                    encode(Hello(role=Role.CLI, name="healthcheck", instance="", nonce=b""))
                )
                message = await read_message(reader, bytes_max=HANDSHAKE_FRAME_BYTES_MAX)
                return isinstance(message, Challenge)
            finally:
                writer.close()
    except (OSError, WireError, TimeoutError):
        return False


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(answers(sys.argv[1], int(sys.argv[2]))) else 1)
