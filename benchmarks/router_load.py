"""Clients of `benchmarks.routers`: they cost little themselves, and tell apart what a fault does to
streams that run and to requests that come after it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

from cli.bench.stats import percentile
from cli.bench.stream_client import StreamClient, StreamRecord

LATE_S = 2.0
"""A request without a token for so long counts as late: at the load here it takes 0.1 s."""


class RawConnection(asyncio.Protocol):
    """Sends the same request whenever the one before it is answered, and nothing else."""

    def __init__(self, request: bytes, until: float) -> None:
        self._request = request
        self._until = until
        self._answer = bytearray()
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None
        self.latencies_s: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not is_whole(self._answer):
            return
        now = time.perf_counter()
        if not self._answer.startswith(b"HTTP/1.1 200"):
            self._end(RuntimeError(f"refused: {bytes(self._answer[:200])!r}"))
            return
        self.latencies_s.append(now - self._sent_at)
        if now < self._until:
            self._send()
        else:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionResetError("closed by the server"))

    def _send(self) -> None:
        assert self._transport is not None
        self._answer.clear()
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def _end(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
        if self._transport is not None:
            self._transport.close()


def is_whole(answer: bytearray) -> bool:
    header_end = answer.find(b"\r\n\r\n")
    if header_end < 0:
        return False
    header = bytes(answer[:header_end]).lower()
    _, found, length = header.partition(b"content-length: ")
    if found:
        return len(answer) - header_end - 4 >= int(length.split(b"\r\n", 1)[0])
    # The last line of a header, which may come alone, may end in 0 as well.
    return answer.endswith(b"\r\n0\r\n\r\n", header_end)


async def closed_loop(
    port: int, body: dict[str, object], *, connections: int, for_s: float
) -> list[float]:
    """Seconds that each request took. A request follows an answer at once."""
    raw = json.dumps(body).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
    )
    until = time.perf_counter() + for_s
    loop = asyncio.get_running_loop()
    opened = [
        (await loop.create_connection(lambda: RawConnection(request, until), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*[connection.done for connection in opened])
    return [latency for connection in opened for latency in connection.latencies_s]


@dataclass(kw_only=True)
class FaultEffect:
    """What clients see of one fault. Times are seconds after it."""

    running: list[StreamRecord]
    later: list[tuple[float, StreamRecord]] = field(default_factory=list)

    def line(self, num_tokens: int) -> str:
        whole = [r for r in self.running if r.error is None and len(r.ids) == num_tokens]
        gaps = [max(r.gaps_ms()) for r in whole]
        failed = [(at, r) for at, r in self.later if r.error is not None]
        late = [(at, r) for at, r in self.later if r.error is None and r.ttft_ms > LATE_S * 1e3]
        bad = [at for at, _ in (*failed, *late)]
        waited_ms = [r.ttft_ms for _, r in self.later if r.arrivals]
        return (
            f"streams whole {len(whole)}/{len(self.running)}, their longest gap "
            f"{percentile(gaps, 50):.0f} / {max(gaps, default=0):.0f} ms (median / max)   "
            f"requests after it: {len(self.later)}, failed {len(failed)}, late {len(late)}, "
            f"the last of those {max(bad, default=0):.1f} s after it, the longest wait for a token "
            f"{max(waited_ms, default=0) / 1e3:.2f} s"
        )


async def watch_fault(
    client: StreamClient,
    num_streams: int,
    *,
    num_tokens: int,
    fault: Callable[[], None],
    repair: Callable[[], None],
    fault_at_s: float,
    lasts_s: float,
    per_s: float,
) -> FaultEffect:
    """Runs `num_streams`, and does `fault` after `fault_at_s`. Then short requests come, `per_s` a
    second, for `lasts_s`; after that comes `repair`, and everything is waited for."""

    def run(number: int, num_tokens: int) -> Coroutine[Any, Any, StreamRecord]:
        text = {"prompt": f"Number {number}: what is a starfish?"}  # not all routers take ids
        return client.run((), num_tokens, fields=text)

    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(run(number, num_tokens)) for number in range(num_streams)]
        await asyncio.sleep(fault_at_s)
        fault()
        began = time.monotonic()
        later: list[tuple[float, asyncio.Task[StreamRecord]]] = []
        while (since := time.monotonic() - began) < lasts_s:
            later.append((since, tasks.create_task(run(num_streams + len(later), 3))))
            await asyncio.sleep(1 / per_s)
        repair()
    return FaultEffect(
        running=[task.result() for task in streams],
        later=[(at, task.result()) for at, task in later],
    )
