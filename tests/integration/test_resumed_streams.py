"""Streams whose gateway and whose rank are killed: clients that come back, at any gateway, have in
the end what they would have had undisturbed. One instance with two gateways serves all tests."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from examples.resume import stream
from gpu_worker.model_tools.seeded_checkpoint import create_seeded_checkpoint
from tests.support.cluster import Cluster, running_cluster
from tests.support.processes import is_running

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.asyncio(loop_scope="module"),
]
NUM_RANKS = 3
NUM_GATEWAYS = 2
NUM_TOKENS = 160
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HI = [{"role": "user", "content": "hi"}]
LONG = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 40, "maxItems": 60}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": [3, 4, 5], **LONG}),
    (COMPLETIONS, {"prompt": "one", **LONG, "n": 2, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"prompt": [7], **LONG, "logprobs": 1, "seed": 3}),
    (COMPLETIONS, {"prompt": [8], **LONG, "stop": "zz", "frequency_penalty": 0.5}),
    (COMPLETIONS, {"prompt": [9], "max_tokens": NUM_TOKENS, "guided_json": SCHEMA}),
    (CHAT, {"messages": HI, **LONG}),
    (MESSAGES, {"messages": HI, "max_tokens": NUM_TOKENS}),
    (RESPONSES, {"input": "hi", "max_output_tokens": NUM_TOKENS}),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("resume")
    model = folder / "model"
    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    create_seeded_checkpoint(model, moe_intermediate_size=32, **small)
    flags = ("--gateways", str(NUM_GATEWAYS))
    async with running_cluster(folder / "run", model, ranks=NUM_RANKS, flags=flags) as running:
        yield running


def read(
    cluster: Cluster, path: str, body: dict[str, Any], on_event: Callable[[], None]
) -> list[dict[str, Any]]:
    events = []
    for event in stream([cluster.url], path, {"model": "any", **body}):
        events.append(event)
        on_event()
    return events


def said(events: list[dict[str, Any]]) -> Any:
    """What each choice says: its text, its log-probabilities and its end. Of the APIs with events
    of different kinds: everything, as often and in the order in which it came, without ids."""
    if "type" in events[0]:
        return one_by_one(events)
    found: dict[int, list[Any]] = {}
    for event in events:
        for choice in event["choices"]:
            texts = found.setdefault(choice["index"], ["", [], None])
            texts[0] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[1] += (choice["logprobs"] or {}).get("token_logprobs", [])
            texts[2] = choice["finish_reason"] or texts[2]
    return found


def one_by_one(events: list[dict[str, Any]]) -> list[Any]:
    """Pieces of texts are put together: after a death tokens come several at a time."""
    found: list[Any] = []
    for event in events:
        kind = event["type"]
        delta = event.get("delta")
        text = delta.get("text") if isinstance(delta, dict) else delta
        if text is None:
            found.append([kind, delta])
        elif found[-1][0] == kind:
            found[-1][1] += text
        else:
            found.append([kind, text])
    response = events[-1].get("response")
    if response is not None:
        numbers = [event["sequence_number"] for event in events]
        assert numbers == list(range(len(events)))
        found.append([item["content"] for item in response["output"]])
        found.append(response["usage"]["output_tokens"])
    return found


async def all_streams(cluster: Cluster, bodies: Any, midway: threading.Event, after: int) -> Any:
    """`midway` is set when all streams together have had so many events."""
    left = [after]

    def on_event() -> None:
        left[0] -= 1
        if left[0] <= 0:
            midway.set()

    return await asyncio.gather(
        *(asyncio.to_thread(read, cluster, path, body, on_event) for path, body in bodies)
    )


async def resumed(cluster: Cluster) -> dict[str, float]:
    """By what had become of the tokens, over all gateways."""
    counts = {"kept": 0.0, "computed_again": 0.0}
    for gateway in (await cluster.status())["gateways"]:
        try:
            text = await cluster.get(f"http://127.0.0.1:{gateway['own_port']}/metrics")
        except OSError:
            continue  # it is dead, and listed until its lease ends
        for line in text.splitlines():
            for kind in counts:
                if line.startswith("starfish_gateway_streams_resumed_total") and kind in line:
                    counts[kind] += float(line.split()[1])
    return counts


async def check(cluster: Cluster, victims: list[int]) -> None:
    """Each client gets exactly what a client gets that is not disturbed and asks for the same,
    though these processes are killed in the middle."""
    model = await cluster.model_name()
    bodies = [(path, {**body, "model": model}) for path, body in BODIES]
    midway = threading.Event()
    running = asyncio.ensure_future(all_streams(cluster, bodies, midway, after=100))
    running.add_done_callback(lambda _: midway.set())  # one that fails is not waited for
    await asyncio.to_thread(midway.wait)
    assert not running.done(), running.exception()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    disturbed = await running
    seeded = [
        (path, {**body, "seed": events[0].get("seed", body.get("seed"))})
        for (path, body), events in zip(bodies, disturbed, strict=True)
    ]
    undisturbed = await all_streams(cluster, seeded, midway, after=0)
    for (path, body), got, wanted in zip(bodies, disturbed, undisturbed, strict=True):
        assert said(got) == said(wanted), (path, body)
        if path == COMPLETIONS:
            assert got[-1].get("usage", {}) == wanted[-1].get("usage", {})


async def pids_of_gateways(cluster: Cluster) -> list[int]:
    """Of both, once they run: one that was killed is listed until its lease ends."""
    async with asyncio.timeout(30):
        while True:
            gateways = (await cluster.status())["gateways"]
            pids = [gateway["pid"] for gateway in gateways if is_running(gateway["pid"])]
            if len(pids) == NUM_GATEWAYS:
                return pids
            await asyncio.sleep(0.1)


async def test_streams_outlive_both_gateways(cluster: Cluster) -> None:
    await check(cluster, await pids_of_gateways(cluster))
    counts = await resumed(cluster)
    assert counts["kept"] > 0, counts


async def test_streams_outlive_a_gateway_and_a_rank(cluster: Cluster) -> None:
    live = await cluster.wait_live(NUM_RANKS)
    await check(cluster, [(await pids_of_gateways(cluster))[-1], live[1]])
