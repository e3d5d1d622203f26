"""One trace for each request: the client's goes on in the gateway's span, attempts on ranks are
children of it, and a death is a pair of events in it. The collector is one of our own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gpu_worker.attempt_reports import AttemptReports
from gpu_worker.engine.sequence import Origin
from shared.clock import SystemClock
from shared.errors import ConfigError
from shared.tracing import Tracer, open_tracer
from shared.types import (
    Attempt,
    Epoch,
    FinishReason,
    Incarnation,
    Member,
    RankId,
    SamplingParams,
    SessionId,
)
from shared.wire import Cancel, SessionTokens, Submit
from tests.support.gateway_harness import GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer

memory_exporter = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="starfish-moe[otel] is missing"
)

TRACE_ID, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENT_SPAN}-01"
BODY = {"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}
HEADERS = {"traceparent": TRACEPARENT, "X-Request-Id": "req-7"}


class Traced:
    """A tracer whose spans stay here."""

    def __init__(self) -> None:
        self.exporter = memory_exporter.InMemorySpanExporter()
        self.tracer = Tracer(self.exporter, SystemClock(), service="test", attributes={})

    def spans(self) -> list[Any]:
        self.tracer.flush()
        return list(self.exporter.get_finished_spans())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture
async def traced() -> AsyncIterator[Traced]:
    found = Traced()
    yield found
    found.tracer.close()


def event_names(span: Any) -> list[str]:
    return [event.name for event in span.events]


async def complete(harness: GatewayHarness, **headers: str) -> int:
    url = harness.url + "/v1/completions"
    async with harness.http.post(url, json=BODY, headers=headers) as response:
        await response.read()
        return response.status


async def test_a_request_is_one_trace_through_a_death(model: Path, traced: Traced) -> None:
    async with running_gateway(model, tracer=traced.tracer) as harness:
        for rank in harness.ranks:
            rank.hold_at = 4
        answer = asyncio.create_task(complete(harness, **HEADERS))
        first = await submitted_to_one_of(harness)
        while not first._next or min(first._next.values()) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await first.kill()
        (other,) = (rank for rank in harness.ranks if rank is not first)
        await other.submitted.wait()
        other.go()
        assert await answer == 200
        assert await complete(harness, traceparent="malformed") == 200
        async with harness.http.get(harness.url + "/health") as response:
            assert response.status in (200, 503)
    span, untold = (span for span in traced.spans() if span.name.startswith("POST"))
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == CLIENT_SPAN
    assert span.name == "POST /v1/completions"
    assert span.attributes["starfish.request_id"] == "req-7"
    assert span.attributes["gen_ai.usage.output_tokens"] == 8
    assert sorted(event_names(span)) == [
        *("session.ended", "session.first_token", "session.placed", "session.placed"),
        *("session.rank_lost", "session.resumed"),
    ]
    submits = [*first.submits, *other.submits]
    assert [submit.attempt for submit in submits[:2]] == [0, 1]
    parent = f"00-{TRACE_ID}-{span.context.span_id:016x}-01"
    assert {submit.traceparent for submit in submits[:2]} == {parent}
    assert {submit.request_id for submit in submits[:2]} == {"req-7"}
    assert untold.parent is None
    assert untold.context.trace_id != span.context.trace_id


async def submitted_to_one_of(harness: GatewayHarness) -> Any:
    waits = {asyncio.create_task(rank.submitted.wait()): rank for rank in harness.ranks}
    done, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    return waits[done.pop()]


def submit(*, attempt: int = 0, traceparent: str = TRACEPARENT) -> Submit:
    return Submit(
        session=SessionId("g/1"),
        attempt=Attempt(attempt),
        tokens=(5, 6, 7),
        num_emitted=0,
        sampling=SamplingParams(),
        request_id="req-7",
        traceparent=traceparent,
    )


def tokens(*ids: int, attempt: int = 0, finish: FinishReason | None = None) -> SessionTokens:
    return SessionTokens(
        session=SessionId("g/1"), attempt=Attempt(attempt), index=0, ids=ids, finish=finish
    )


MEMBER = Member(rank=RankId(3), incarnation=Incarnation(7))
HERE = Origin(1)


def test_an_attempt_is_a_span_below_the_gateways(traced: Traced) -> None:
    reports = AttemptReports(MEMBER, traced.tracer)
    reports.on_submit(HERE, submit())
    reports.on_adopted(Epoch(4), abandoned=True)
    reports.on_tokens([tokens(9)])
    reports.on_tokens([tokens(9), tokens(8, attempt=5)])
    reports.on_tokens([tokens(finish=FinishReason.LENGTH)])
    reports.on_adopted(Epoch(5), abandoned=False)
    (span,) = traced.spans()
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert event_names(span) == ["map_adopted", "first_token"]
    assert span.attributes["starfish.rank"] == 3
    assert span.attributes["starfish.outcome"] == "length"
    assert span.attributes["starfish.generated_tokens"] == 2


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (lambda r: r.on_cancel(Cancel(session=SessionId("g/1"), attempt=Attempt(1))), "cancelled"),
        (lambda r: r.on_origin_gone(HERE), "gateway_gone"),
        (lambda r: r.on_submit(HERE, submit(attempt=2, traceparent="")), "replaced"),
        (lambda r: r.close(), "rank_ended"),
    ],
)
def test_every_end_of_an_attempt_ends_its_span(
    end: Callable[[AttemptReports], None], outcome: str, traced: Traced
) -> None:
    reports = AttemptReports(MEMBER, traced.tracer)
    reports.on_submit(HERE, submit(attempt=1))
    reports.on_cancel(Cancel(session=SessionId("g/1"), attempt=Attempt(0)))
    reports.on_origin_gone(Origin(2))
    assert traced.spans() == []
    end(reports)
    assert [span.attributes["starfish.outcome"] for span in traced.spans()] == [outcome]


def test_what_the_gateway_does_not_trace_the_rank_does_not_either(traced: Traced) -> None:
    reports = AttemptReports(MEMBER, traced.tracer)
    reports.on_submit(HERE, submit(traceparent=""))
    reports.close()
    assert traced.spans() == []


async def test_spans_reach_a_collector_over_http() -> None:
    received: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        received.append(await request.read())
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    async with TestServer(app) as server:
        endpoint = str(server.make_url("/"))
        tracer = open_tracer(endpoint, SystemClock(), service="starfish-test", attributes={"a": 1})
        assert tracer is not None
        tracer.start("one", {"b": 2}, parent=TRACEPARENT).end(error="it failed")
        await asyncio.to_thread(tracer.close)
    (body,) = received
    for text in (b"starfish-test", b"one", b"it failed", bytes.fromhex(TRACE_ID)):
        assert text in body


def test_an_endpoint_that_is_none_is_refused_in_one_sentence() -> None:
    assert open_tracer("", SystemClock(), service="x", attributes={}) is None
    with pytest.raises(ConfigError, match="--otlp-endpoint 'collector:4317'"):
        open_tracer("collector:4317", SystemClock(), service="x", attributes={})
