"""The gateway over real sockets against toy ranks: OpenAI's API as clients use it, and streams
that go on when ranks die."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from shared.codec import unpack
from shared.records import GatewayRecord, Suspicion
from shared.types import Accuser, SuspicionReason
from tests.support.authentication import api_key
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import EOS, ToyRank, toy_tokens
from tests.support.vendor_clients import openai_client

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest_asyncio.fixture
async def harness(model: Path) -> AsyncIterator[GatewayHarness]:
    async with running_gateway(model) as running:
        yield running


def completion(**fields: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }


async def post(harness: GatewayHarness, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    async with harness.http.post(harness.url + path, json=body) as response:
        return response.status, await response.json()


class Stream:
    """Reads one event stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.ids: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self.error: dict[str, Any] | None = None
        self.done = False

    async def read(self, num_tokens: int | None = None) -> None:
        """Until that many tokens, or the end."""
        while num_tokens is None or len(self.ids) < num_tokens:
            line = await self.response.content.readline()
            if not line:
                return
            if line.strip() == b"data: [DONE]":
                self.done = True
            elif line.startswith(b"data: "):
                self._take(json.loads(line[6:]))

    def _take(self, event: dict[str, Any]) -> None:
        self.error = event.get("error") or self.error
        for choice in event.get("choices", ()):
            self.ids += choice.get("token_ids") or []
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish


async def test_a_stream_shows_every_token_once_and_ends_with_done(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    async with harness.http.post(
        harness.url + "/v1/completions", json=completion(stream=True)
    ) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        stream = Stream(response)
        await stream.read()
    assert stream.ids == toy_tokens(PROMPT, 12)
    assert stream.text == tokenizer.decode(stream.ids)
    assert (stream.finish, stream.done, stream.error) == ("length", True, None)


async def test_a_stream_goes_on_exactly_when_its_rank_is_killed(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.hold_at = 5
    async with harness.http.post(
        harness.url + "/v1/completions", json=completion(stream=True)
    ) as response:
        stream = Stream(response)
        await stream.read(5)
        victim = next(r for r in harness.ranks if r.submits)
        assert response.headers["x-starfish-rank"] == str(victim.member.rank)
        survivor = next(r for r in harness.ranks if r is not victim)
        survivor.go()
        await victim.kill()
        await stream.read()
    assert stream.ids == toy_tokens(PROMPT, 12)
    assert stream.done
    assert [s.num_emitted for s in survivor.submits] == [5]
    key = harness.keys.suspicion(*_ids(victim), Accuser.GATEWAY, victim.gateways[0])
    found = await _eventually_there(harness, key)
    suspicion = unpack(found, Suspicion)
    assert (suspicion.rank, suspicion.reason) == (victim.member.rank, SuspicionReason.RESET)
    assert await harness.metric("session_moves_total") == 1


async def test_many_streams_survive_one_rank_after_the_other(harness: GatewayHarness) -> None:
    async def one(prompt: list[int]) -> Stream:
        body = completion(prompt=prompt, stream=True, max_tokens=60)
        async with harness.http.post(harness.url + "/v1/completions", json=body) as response:
            stream = Stream(response)
            await stream.read()
            return stream

    prompts = [[10 + n, 11, 12] for n in range(8)]
    reading = [asyncio.create_task(one(prompt)) for prompt in prompts]
    first, second = harness.ranks
    for dying in (first, second):
        await asyncio.sleep(0.02)
        await dying.kill()
        fresh = await harness.add_rank(ToyRank(dying.member.rank, dying.member.incarnation + 1))
        await harness.publish([fresh, second] if dying is first else [harness.ranks[2], fresh])
    streams = await asyncio.gather(*reading)
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.ids == toy_tokens(prompt, 60)
        assert stream.done


async def test_a_map_that_leaves_a_hung_rank_out_moves_its_sessions(
    harness: GatewayHarness,
) -> None:
    for rank in harness.ranks:
        rank.hold_at = 3
    async with harness.http.post(
        harness.url + "/v1/completions", json=completion(stream=True)
    ) as response:
        stream = Stream(response)
        await stream.read(3)
        hung = next(r for r in harness.ranks if r.submits)
        survivor = next(r for r in harness.ranks if r is not hung)
        survivor.go()
        await harness.publish([survivor])
        await stream.read()
    assert stream.ids == toy_tokens(PROMPT, 12)


async def test_a_refused_session_goes_elsewhere(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.refuse = 2
    status, body = await post(harness, "/v1/completions", completion())
    assert status == 200
    assert body["choices"][0]["token_ids"] == toy_tokens(PROMPT, 12)


async def test_a_rejected_session_fails_with_the_ranks_reason(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.reject = "no finite logits"
    status, body = await post(harness, "/v1/completions", completion())
    assert status == 500
    assert "no finite logits" in body["error"]["message"]


async def test_without_etcd_the_last_map_serves(harness: GatewayHarness) -> None:
    assert harness.gateway_store is not None
    harness.gateway_store.reachable = False
    status, body = await post(harness, "/v1/completions", completion())
    assert status == 200
    assert body["choices"][0]["token_ids"] == toy_tokens(PROMPT, 12)
    harness.gateway_store.reachable = True


async def test_the_gateway_registers_under_a_lease_and_again_when_it_is_lost(
    harness: GatewayHarness,
) -> None:
    async def registered() -> tuple[int, GatewayRecord]:
        async with asyncio.timeout(20):
            while True:
                found = (await harness.store.get_prefix(harness.keys.gateways)).values
                if found:
                    return found[0].lease_id, unpack(found[0].value, GatewayRecord)
                await asyncio.sleep(0.01)

    lease_id, record = await registered()
    assert harness.url.endswith(f":{record.port}")
    await harness.store.revoke_lease(lease_id)
    again, same = await registered()
    assert again != lease_id
    assert same == record


async def test_a_client_that_leaves_cancels_its_session(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.hold_at = 2
    async with harness.http.post(
        harness.url + "/v1/completions", json=completion(stream=True)
    ) as response:
        await Stream(response).read(2)
        response.close()
    await _cancelled(harness)
    await harness.wait_metric("sessions_in_flight", 0)
    await harness.wait_metric("tokens_in_flight", 0)


async def test_a_client_that_leaves_before_the_first_token_cancels_too(
    harness: GatewayHarness,
) -> None:
    for rank in harness.ranks:
        rank.hold_at = 0
    request = asyncio.create_task(post(harness, "/v1/completions", completion()))
    await _first(harness, "submitted")
    request.cancel()
    await _cancelled(harness)


async def test_a_stop_string_ends_the_text_before_it_and_cancels(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    script = tokenizer.encode("The quick brown fox jumps over the lazy dog. The starfish").ids
    for rank in harness.ranks:
        rank.script = script
    request = completion(stop=["x jum", "dog"], max_tokens=len(script), stream=True)
    async with harness.http.post(harness.url + "/v1/completions", json=request) as response:
        stream = Stream(response)
        await stream.read()
    assert stream.text == "The quick brown fo"
    assert (stream.finish, stream.done) == ("stop", True)
    assert stream.ids == script[: len(stream.ids)]
    await _cancelled(harness)


async def test_a_stop_token_is_no_text(harness: GatewayHarness, tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("The starfish").ids, EOS]
    for rank in harness.ranks:
        rank.script = script
    status, body = await post(
        harness, "/v1/completions", completion(ignore_eos=False, max_tokens=100)
    )
    choice = body["choices"][0]
    assert (status, choice["text"], choice["finish_reason"]) == (200, "The starfish", "stop")
    assert choice["stop_reason"] is None, "the model's own end"
    assert choice["token_ids"] == script
    assert body["usage"]["completion_tokens"] == len(script)


async def test_an_answer_says_what_stopped_it(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    for rank in harness.ranks:
        rank.script = tokenizer.encode("The quick brown fox").ids
    _, body = await post(harness, "/v1/completions", completion(stop=["brown"]))
    assert body["choices"][0]["stop_reason"] == "brown"
    assert body["system_fingerprint"].startswith("fp_")


async def test_several_prompts_give_a_choice_each(harness: GatewayHarness) -> None:
    prompts = [[5, 6], [7, 8], [9]]
    status, body = await post(harness, "/v1/completions", completion(prompt=prompts))
    assert status == 200
    got = [choice["token_ids"] for choice in body["choices"]]
    assert got == [toy_tokens(prompt, 12) for prompt in prompts]
    assert body["usage"]["prompt_tokens"] == 5


async def test_usage_tells_how_much_of_the_prompt_was_cached(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.cached_tokens = 2
    _, body = await post(harness, "/v1/completions", completion(prompt=[[5, 6, 7], [8, 9, 5]], n=2))
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (6, {"cached_tokens": 4})


async def test_the_openai_client_chats_unchanged(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    async with openai.AsyncOpenAI(base_url=harness.url + "/v1", api_key=api_key()) as client:
        models = await client.models.list()
        assert [m.id for m in models.data] == [MODEL]
        messages: Any = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Grow"}]},
        ]
        whole = await client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=20, temperature=0
        )
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage, finish, role = "", None, None, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                role = choice.delta.role or role
                finish = choice.finish_reason or finish
    rendered = "<|begin|>system\nBe brief.<|end|>\n<|begin|>user\nGrow<|end|>\n<|begin|>assistant\n"
    prompt = tokenizer.encode(rendered).ids
    assert whole.choices[0].message.content == tokenizer.decode(toy_tokens(prompt, 20))
    assert whole.usage is not None
    assert usage is not None
    assert (text, role, finish) == (whole.choices[0].message.content, "assistant", "length")
    assert usage.prompt_tokens == whole.usage.prompt_tokens == len(prompt)
    assert usage.completion_tokens == 20


async def test_the_blocking_openai_client_streams(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    def read() -> str:
        with openai.OpenAI(base_url=harness.url + "/v1", api_key=api_key()) as client:
            stream = client.completions.create(
                model=MODEL, prompt="The starfish", max_tokens=9, temperature=0, stream=True
            )
            return "".join(chunk.choices[0].text for chunk in stream)

    prompt = tokenizer.encode("The starfish").ids
    assert await asyncio.to_thread(read) == tokenizer.decode(toy_tokens(prompt, 9))


async def test_the_openai_client_meets_its_own_error_classes(harness: GatewayHarness) -> None:
    async with openai_client(harness) as client:
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model=MODEL, prompt="x", n=200)
        assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_json", None),
        (b"[1]", 400, None, None),
        (b'{"prompt": "x", "max_tokens": "many"}', 400, None, "max_tokens"),
        (b'{"model": "nobody", "prompt": "x"}', 404, "model_not_found", "model"),
        (b'{"prompt": [1, 5000]}', 400, None, "prompt"),
        (b'{"prompt": ""}', 400, None, "prompt"),
        (b'{"max_tokens": 3}', 400, None, "prompt"),
        (b'{"prompt": "x", "max_tokens": 4000}', 400, "context_length_exceeded", None),
        (b'{"prompt": "' + b"ab " * 100_000 + b'"}', 400, "context_length_exceeded", None),
        (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413, "request_too_large", None),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json", None),
    ],
)
async def test_bad_requests_get_openais_error_shape(
    harness: GatewayHarness, body: bytes, status: int, code: str | None, param: str | None
) -> None:
    async with harness.http.post(
        harness.url + "/v1/completions", data=io.BytesIO(body)
    ) as response:
        answer = await response.json()
        assert response.status == status, answer
    error = answer["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert not any(rank.submits for rank in harness.ranks)


async def test_unknown_paths_and_methods_have_the_shape_too(harness: GatewayHarness) -> None:
    for method, path, status in [("GET", "/v2", 404), ("GET", "/v1/completions", 405)]:
        async with harness.http.request(method, harness.url + path) as response:
            assert response.status == status
            assert (await response.json())["error"]["message"]


async def test_a_full_gateway_says_when_to_come_back(model: Path) -> None:
    async with running_gateway(model, sessions_max=1) as harness:
        for rank in harness.ranks:
            rank.hold_at = 0
        first = asyncio.create_task(post(harness, "/v1/completions", completion()))
        await harness.wait_metric("sessions_in_flight", 1)
        async with harness.http.post(
            harness.url + "/v1/completions", json=completion()
        ) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["error"]["type"] == "rate_limit_error"
        for rank in harness.ranks:
            rank.go()
        assert (await first)[0] == 200


async def test_no_rank_for_too_long_is_a_503(model: Path) -> None:
    async with running_gateway(model, num_ranks=0, no_rank_timeout_s=0.05) as harness:
        status, body = await post(harness, "/v1/completions", completion())
        assert status == 503
        assert body["error"]["code"] == "no_rank_available"
        async with harness.http.get(harness.url + "/health") as response:
            assert response.status == 503
            assert (await response.json())["reasons"] == [
                "no expert map is published yet: 0 of 0 ranks are registered, 0 of them ready"
            ]


async def test_a_stream_that_loses_its_last_rank_ends_with_an_error_event(model: Path) -> None:
    async with running_gateway(model, num_ranks=1, no_rank_timeout_s=0.5) as harness:
        harness.ranks[0].hold_at = 2
        async with harness.http.post(
            harness.url + "/v1/completions", json=completion(stream=True)
        ) as response:
            stream = Stream(response)
            await stream.read(2)
            await harness.ranks[0].kill()
            await stream.read()
    assert stream.ids == toy_tokens(PROMPT, 2)
    assert stream.error is not None
    assert stream.error["code"] == "no_rank_available"
    assert stream.done
    assert stream.finish is None


async def test_a_new_session_waits_for_a_rank_that_comes(model: Path) -> None:
    async with running_gateway(model, num_ranks=0) as harness:
        request = asyncio.create_task(post(harness, "/v1/completions", completion()))
        await harness.wait_metric("sessions_in_flight", 1)
        rank = await harness.add_rank(ToyRank(0))
        await harness.publish([rank])
        status, body = await request
    assert status == 200
    assert body["choices"][0]["token_ids"] == toy_tokens(PROMPT, 12)


async def test_a_mute_rank_gets_no_new_sessions(harness: GatewayHarness) -> None:
    hung, healthy = harness.ranks
    hung.mute = True
    await harness.wait_metric('suspicions_total{reason="silence"}', 1)
    for _ in range(4):
        status, _ = await post(harness, "/v1/completions", completion(max_tokens=2))
        assert status == 200
    assert not hung.submits
    assert len(healthy.submits) == 4
    hung.mute = False


async def test_draining_lets_streams_end_and_takes_no_new_ones(model: Path) -> None:
    async with running_gateway(model, drain_s=60.0) as harness:
        for rank in harness.ranks:
            rank.hold_at = 3
        await drain_in_mid_stream(harness)


async def drain_in_mid_stream(harness: GatewayHarness) -> None:
    async with harness.http.post(
        harness.url + "/v1/completions", json=completion(stream=True)
    ) as response:
        stream = Stream(response)
        await stream.read(3)
        harness.stop.set()
        await asyncio.sleep(0.05)
        status, _ = await post(harness, "/v1/completions", completion())
        assert status == 503
        for rank in harness.ranks:
            rank.go()
        await stream.read()
    assert stream.ids == toy_tokens(PROMPT, 12)
    assert stream.done


def _ids(rank: ToyRank) -> tuple[Any, Any]:
    return rank.member.rank, rank.member.incarnation


async def _eventually_there(harness: GatewayHarness, key: str) -> bytes:
    async with asyncio.timeout(20):
        while True:
            found = await harness.store.get(key)
            if found is not None:
                return found.value
            await asyncio.sleep(0.01)


async def _cancelled(harness: GatewayHarness) -> None:
    await _first(harness, "cancelled")


async def _first(harness: GatewayHarness, event: str) -> None:
    """Until any rank has seen a Submit ("submitted") or a Cancel ("cancelled")."""
    waits = [asyncio.create_task(getattr(rank, event).wait()) for rank in harness.ranks]
    done, pending = await asyncio.wait(waits, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    assert done
