"""`python -m node_agent.health HOST PORT`: exit code 0 where a rank answers there, for a
container's healthcheck."""

from __future__ import annotations

import asyncio
import sys

from shared.errors import WireError
from shared.wire import Hello, Ping, Pong, encode, read_message

_TIMEOUT_S = 3.0


async def answers(host: str, port: int) -> bool:
    """Both its event loop and its protocol live; the engine is the control plane's to judge."""
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
