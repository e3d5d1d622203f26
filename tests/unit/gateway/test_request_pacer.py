"""In which order requests begin, and that the event loop serves others between them."""

from __future__ import annotations

import asyncio
import socket

from gateway.request_pacer import RequestPacer


async def test_of_two_clients_each_begins_one_in_turn_however_many_the_other_has_sent() -> None:
    pacer, begun = RequestPacer(), list[str]()

    async def request(client: str) -> None:
        await pacer.begin(client)
        begun.append(client)

    async with asyncio.TaskGroup() as tasks:
        for client in ["a"] * 6 + ["b"] * 3:
            tasks.create_task(request(client))
    assert begun == ["a", "a", "b", "a", "b", "a", "b", "a", "a"]


async def test_what_comes_by_a_socket_is_read_before_the_next_request_begins() -> None:
    """As many bytes arrive while requests begin as there are requests: they are read one by one
    between them, not all after the last."""
    pacer, order = RequestPacer(), list[str]()
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    loop = asyncio.get_running_loop()
    loop.add_reader(right, lambda: order.append(right.recv(1).decode()))

    async def request() -> None:
        await pacer.begin("a")
        order.append("request")
        left.send(b"x")

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(request())
        assert order[:8] == ["request", "x"] * 4
    finally:
        loop.remove_reader(right)
        left.close()
        right.close()


async def test_a_client_that_leaves_while_it_waits_takes_no_turn() -> None:
    pacer = RequestPacer()
    await pacer.begin("a")
    gone = [asyncio.create_task(pacer.begin("a")) for _ in range(3)]
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    async with asyncio.timeout(5):
        await pacer.begin("b")
        await pacer.begin("a")
    await asyncio.gather(*gone, return_exceptions=True)
