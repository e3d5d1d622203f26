"""`python -m node_agent.health HOST PORT`: exits with 0 if a rank answers there, for a container's
health check."""

from __future__ import annotations

import asyncio
import sys

from shared.errors import WireError
from shared.wire import Hello, Ping, Pong, encode, read_message

_TIMEOUT_S = 3.0


async def answers(host: str, port: int) -> bool:
    """Whether the rank's event loop answers the protocol. The control plane judges its engine."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(encode(Hello(role="cli", name="healthcheck")))
                writer.write(encode(Ping(nonce=1)))
                while (message := await read_message(reader)) is not None:
                    if isinstance(message, Pong):
                        return True
                return False
            finally:
                writer.close()
    except (OSError, WireError, TimeoutError):
        return False


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(answers(sys.argv[1], int(sys.argv[2]))) else 1)
