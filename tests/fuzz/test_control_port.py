"""A rank's control port and whatever comes to it: before the handshake, within it, and after it
from every role. It goes on serving others at once."""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress

import pytest

from gpu_worker.control_server import MAY_SEND
from shared.codec import pack_plain, to_plain
from shared.errors import WireError
from shared.handshake import NAME_KEY_BYTES, Caller, gateway_caller, rank_caller
from shared.types import Role
from shared.wire import Hello, Proof
from tests.fuzz.budget import Fuzzing
from tests.fuzz.mutator import Mutator
from tests.fuzz.test_wire import frame
from tests.support.control_port import PEER, ControlPort, control_port

CALLERS = (
    gateway_caller("gateway", b"k" * NAME_KEY_BYTES),
    rank_caller(PEER),
    Caller(role=Role.CONTROL_PLANE, name="plane"),
    Caller(role=Role.CLI, name="cli"),
)
WATCHER = Caller(role=Role.CLI, name="watcher")
SERVED_WITHIN_S = 20.0


def with_length(body: bytes, mutator: Mutator) -> bytes:
    """Now and then a wrong one."""
    length = len(body) if mutator.rng.random() < 0.9 else mutator.rng.randrange(1 << 32)
    return struct.pack(">I", length) + body


def handshake_part(mutator: Mutator) -> bytes:
    kind = mutator.rng.choice((Hello, Proof))
    return pack_plain([kind.__name__, mutator.value(to_plain(mutator.sample(kind)))])


def message_of(role: Role, mutator: Mutator) -> bytes:
    """Mostly one that the role may send."""
    if mutator.rng.random() < 0.3:
        return frame(mutator)
    kind = mutator.rng.choice(MAY_SEND[role])
    fields = to_plain(mutator.sample(kind))
    if mutator.rng.random() < 0.5:
        fields = mutator.value(fields)
    try:
        return pack_plain([kind.__name__, fields])
    except (ValueError, OverflowError, TypeError, UnicodeEncodeError):
        return b"\xc0"


async def attack(port: ControlPort, caller: Caller | None, data: bytes) -> None:
    """Until the port ends the connection or has nothing more to say."""
    try:
        connection = await (port.connect() if caller is None else port.enter(caller))
        connection.writer.write(data)
        connection.writer.write_eof()
        async with asyncio.timeout(0.2):
            while await connection.reader.read(1 << 16):
                pass
    except (ConnectionError, WireError, TimeoutError):
        pass
    finally:
        with suppress(UnboundLocalError):
            connection.writer.transport.abort()


def inputs(mutator: Mutator, caller: Caller | None) -> bytes:
    count = mutator.rng.choice((1, 1, 3, 10))
    if caller is None:
        parts = [mutator.rng.choice((handshake_part, frame))(mutator) for _ in range(count)]
    else:
        parts = [message_of(caller.role, mutator) for _ in range(count)]
    data = b"".join(with_length(part, mutator) for part in parts)
    return mutator.data(data) if mutator.rng.random() < 0.2 else data


@pytest.mark.timeout(0)
async def test_the_control_port_serves_on_whatever_it_is_sent() -> None:
    fuzzing = Fuzzing("control_port")
    mutator = Mutator(fuzzing.rng)
    crashed: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: crashed.append(context))
    async with control_port() as port:
        watcher = await port.enter(WATCHER)

        async def expect_served() -> None:
            async with asyncio.timeout(SERVED_WITHIN_S):
                assert await watcher.is_served()
            assert crashed == []

        for data in fuzzing.corpus():
            for caller in (None, *CALLERS):
                await attack(port, caller, data)
                await expect_served()
        for _ in fuzzing.rounds():
            caller = mutator.rng.choice((None, *CALLERS))
            data = inputs(mutator, caller)
            with fuzzing.kept_on_failure(data):
                await attack(port, caller, data)
                await expect_served()
    assert fuzzing.num_inputs > 5
