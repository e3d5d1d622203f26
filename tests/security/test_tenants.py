"""Clients of one gateway against each other: without a key, with a wrong one, with all of the
budget, with a deadline, and with somebody else's prompt. Toy ranks stand behind the gateway; what
they are sent is what counts."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from shared.api_key import new_api_key, spelt_hash
from shared.wire import Submit
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import toy_tokens

ALICE, BOB, OPS = new_api_key(), new_api_key(), new_api_key()
PROMPT = list(range(10, 60))
KEYS = f"""
[keys.alice]
hash = "{spelt_hash(ALICE)}"
priority_min = -5
[keys.bob]
hash = "{spelt_hash(BOB)}"
requests_per_minute = 1000
tokens_per_minute = 100000
[keys.ops]
hash = "{spelt_hash(OPS)}"
reads_metrics = true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys.toml", KEYS)


def write_keys(file: Path, text: str) -> Path:
    """Whole or not at all, for whoever reads it meanwhile."""
    written = file.with_name("written")
    written.touch(mode=0o600)
    written.write_text(text)
    written.rename(file)
    return file


async def logged(capsys: pytest.CaptureFixture[str], words: str, times: int = 1) -> str:
    """What has been logged since the last look, once these words are in it so often."""
    text = ""
    async with asyncio.timeout(20):
        while text.count(words) < times:
            await asyncio.sleep(0.01)
            text += capsys.readouterr().out
    return text


@pytest_asyncio.fixture
async def harness(model: Path, key_file: Path) -> AsyncIterator[GatewayHarness]:
    async with running_gateway(model, api_key_file=key_file, api_key=ALICE) as running:
        yield running


def body(**fields: Any) -> dict[str, Any]:
    plain = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
    return {**plain, "return_token_ids": True, **fields}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(
    harness: GatewayHarness, headers: dict[str, str], **fields: Any
) -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
    url, raw = harness.url + "/v1/completions", json.dumps(body(**fields)).encode()
    headers = {"Content-Type": "application/json", **headers}
    async with harness.http.post(url, data=io.BytesIO(raw), headers=headers) as response:
        return response, await response.json()


async def submits_of(harness: GatewayHarness, number: int) -> list[Submit]:
    async with asyncio.timeout(20):
        while (  # noqa: ASYNC110
            len(found := [s for rank in harness.ranks for s in rank.submits]) < number
        ):
            await asyncio.sleep(0.01)
    return found


# Keys.


async def test_without_a_right_key_nothing_is_served(harness: GatewayHarness) -> None:
    wrong: list[dict[str, str]] = [
        {},
        bearer("wrong"),
        bearer(""),
        {"Authorization": ALICE},
        {"Authorization": f"Basic {ALICE}"},
        {"x-api-key": ALICE[:-1]},
        bearer(spelt_hash(ALICE)),
    ]
    for headers in wrong:
        response, answer = await ask(harness, headers)
        assert response.status == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert answer["error"]["code"] == "invalid_api_key"
        assert answer["error"]["type"] == "invalid_request_error"
        for path in ("/v1/models", "/v1/models/x", "/nowhere"):
            async with harness.http.get(harness.url + path, headers=headers) as other:
                assert other.status == 401
    assert [s for rank in harness.ranks for s in rank.submits] == []
    assert await harness.metric("unauthenticated_total") == 4 * len(wrong)


async def test_a_stranger_does_not_learn_by_options_which_paths_there_are(
    harness: GatewayHarness,
) -> None:
    answers = set()
    for path in ("/v1/models", "/v1/completions", "/nowhere"):
        async with harness.http.options(harness.url + path, headers={}) as response:
            answers.add((response.status, response.headers["Allow"], await response.text()))
    assert len(answers) == 1


async def test_a_key_is_taken_from_both_headers(harness: GatewayHarness) -> None:
    for headers in (bearer(ALICE), {"authorization": f"bearer {ALICE}"}, {"X-Api-Key": ALICE}):
        response, answer = await ask(harness, headers)
        assert response.status == 200
        assert answer["choices"][0]["token_ids"] == toy_tokens(PROMPT, 4)


async def test_openais_client_raises_what_it_should(harness: GatewayHarness) -> None:
    async with openai.AsyncOpenAI(base_url=harness.url + "/v1", api_key="no", max_retries=0) as bad:
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            await bad.completions.create(model=MODEL, prompt="x")
    async with openai.AsyncOpenAI(base_url=harness.url + "/v1", api_key=ALICE) as good:
        assert (await good.completions.create(model=MODEL, prompt="x")).choices[0].text


async def test_health_is_open_and_metrics_can_be_closed(model: Path, key_file: Path) -> None:
    async with running_gateway(
        model, api_key_file=key_file, metrics_need_key=True, api_key=OPS
    ) as harness:
        for path in ("/health", "/health/live", "/health/ready"):
            async with harness.http.get(harness.url + path) as response:
                assert response.status == 200
        for headers, status in (({}, 401), (bearer(ALICE), 403), (bearer(OPS), 200)):
            async with harness.http.get(harness.url + "/metrics", headers=headers) as response:
                assert response.status == status


async def test_a_changed_file_is_read_and_a_broken_one_is_not(
    harness: GatewayHarness, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def until(key: str, status: int) -> None:
        async with asyncio.timeout(20):
            while (await ask(harness, bearer(key)))[0].status != status:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    fresh = new_api_key()
    write_keys(key_file, f'[keys.alice]\nhash = "{spelt_hash(fresh)}"')
    await until(fresh, 200)
    await until(ALICE, 401)
    assert "api_keys_unusable" not in capsys.readouterr().out
    for broken in ("[keys.alice", "", None):
        if broken is None:
            key_file.unlink()
        else:
            write_keys(key_file, broken)
        assert (await logged(capsys, "api_keys_unusable")).count("api_keys_unusable") == 1
        assert (await ask(harness, bearer(fresh)))[0].status == 200
    write_keys(key_file, KEYS)
    await until(ALICE, 200)
    assert "api_keys_unusable" not in capsys.readouterr().out


async def test_neither_keys_nor_hashes_are_in_logs_or_metrics(
    harness: GatewayHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    for headers in (bearer(ALICE), {"x-api-key": BOB}, bearer("sk-starfish-" + "w" * 43)):
        await ask(harness, headers)
    async with harness.http.get(harness.url + "/metrics") as response:
        metrics = await response.text()
    logged = capsys.readouterr().out
    assert "alice" in logged
    assert 'key="alice"' in metrics
    for secret in (ALICE, BOB, "w" * 43, spelt_hash(ALICE), spelt_hash(ALICE)[7:]):
        assert secret not in logged
        assert secret not in metrics


async def test_a_key_in_the_wrong_place_is_not_in_logs(
    harness: GatewayHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a header that is no header, in a line that is too long, and in a path."""
    port = harness.url.rpartition(":")[2]
    for sent in (
        f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {ALICE}\r\n\r\n",
        f"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: {ALICE}{'x' * 100_000}\r\n\r\n",
        f"GET {ALICE} HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET /v1/models/{ALICE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(sent.encode())
        async with asyncio.timeout(20):
            assert (await reader.read()).split()[1] in (b"400", b"401")
        writer.close()
    logged = capsys.readouterr().out
    assert "malformed_request" in logged
    assert "/v1/models/" in logged
    assert ALICE not in logged


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys.toml", KEYS)
    file.chmod(0o644)
    result = subprocess.run(
        [sys.executable, "-m", "gateway", "--port", "0", "--api-key-file", str(file)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode != 0
    assert "chmod 600" in result.stderr


# Budgets.


async def test_one_client_cannot_fill_the_gateway(model: Path, key_file: Path) -> None:
    async with running_gateway(
        model, api_key_file=key_file, sessions_max=64, api_key=ALICE
    ) as harness:
        for rank in harness.ranks:
            rank.hold_at = 1
        greedy = [
            asyncio.create_task(ask(harness, bearer(ALICE), n=8, max_tokens=8)) for _ in range(8)
        ]
        refused, _ = await asyncio.wait(greedy, return_when=asyncio.FIRST_COMPLETED)
        (first,) = refused
        response, answer = first.result()
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert answer["error"]["type"] == "rate_limit_error"
        await submits_of(harness, 7 * 8)
        late = asyncio.create_task(ask(harness, bearer(BOB), max_tokens=4))
        await submits_of(harness, 7 * 8 + 1)
        for rank in harness.ranks:
            rank.go()
        response, answer = await late
        assert response.status == 200
        assert answer["choices"][0]["token_ids"] == toy_tokens(PROMPT, 4)
        assert sorted([(await each)[0].status for each in greedy]) == [200] * 7 + [429]


async def test_rates_are_told_and_a_refusal_says_when(model: Path, tmp_path: Path) -> None:
    text = f'[keys.k]\nhash = "{spelt_hash(ALICE)}"\nrequests_per_minute = 2\n'
    keys = write_keys(tmp_path / "keys.toml", text + "tokens_per_minute = 6000\n")
    async with running_gateway(model, api_key_file=keys, api_key=ALICE) as harness:
        response, _ = await ask(harness, bearer(ALICE))
        told = {k: v for k, v in response.headers.items() if k.startswith("x-ratelimit")}
        assert told["x-ratelimit-limit-requests"] == "2"
        assert told["x-ratelimit-remaining-requests"] == "1"
        assert told["x-ratelimit-limit-tokens"] == "6000"
        assert int(told["x-ratelimit-remaining-tokens"]) >= 6000 - len(PROMPT) - 4
        assert told["x-ratelimit-reset-requests"].endswith("s")
        await ask(harness, bearer(ALICE))
        response, answer = await ask(harness, bearer(ALICE))
        assert response.status == 429
        assert answer["error"]["code"] == "rate_limit_exceeded"
        assert 20 <= int(response.headers["Retry-After"]) <= 30
        assert response.headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_refused_request_is_neither_tokenised_nor_kept(model: Path, tmp_path: Path) -> None:
    """4 MB of text would take a second to tokenise."""
    text = f'[keys.k]\nhash = "{spelt_hash(ALICE)}"\ntokens_max = 1000\nrequests_max = 10\n'
    keys = write_keys(tmp_path / "keys.toml", text)
    async with running_gateway(
        model, api_key_file=keys, api_key=ALICE, context_tokens_max=2_000_000
    ) as harness:
        for rank in harness.ranks:
            rank.hold_at = 1
        held = asyncio.create_task(ask(harness, bearer(ALICE)))
        await submits_of(harness, 1)
        for _ in range(5):
            response, _ = await ask(harness, bearer(ALICE), prompt="a b " * 900_000)
            assert response.status == 429
        assert await harness.metric("tokens_in_flight") == len(PROMPT) + 4
        for rank in harness.ranks:
            rank.go()
        await held
        await harness.wait_metric("tokens_in_flight", 0)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt":"a","max_tokens":1' + b"".join(b',"%06d":1' % i for i in range(380_000)) + b"}",
        b'{"prompt":[' + b"[]," * 1_390_000 + b"[]]}",
        b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}}",
    ],
    ids=["members", "lists", "members of a member"],
)
async def test_a_body_of_many_small_values_is_not_decoded(
    harness: GatewayHarness, raw: bytes
) -> None:
    """4 MB of them held up everybody's tokens for 0.1 to 0.8 s of the event loop."""
    headers = {"Content-Type": "application/json", **bearer(ALICE)}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"):
        url = harness.url + path
        async with harness.http.post(url, data=io.BytesIO(raw), headers=headers) as response:
            answer = await response.json()
        assert (response.status, answer["error"]["code"]) == (400, "too_many_values")


async def test_bodies_that_never_end_take_bounded_memory_and_leave_room_for_others(
    harness: GatewayHarness,
) -> None:
    """Each held 4 MB for a minute, and one client may have thousands of connections."""
    host, port = harness.url.removeprefix("http://").split(":")
    header = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
        "Content-Type: application/json\r\n"
    )
    forms = ("Content-Length: 4194304", "["), ("Transfer-Encoding: chunked", "1\r\n[\r\n")
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    try:
        for number in range(100):
            opened.append(await asyncio.open_connection(host, int(port)))
            field, begun = forms[number % 2]
            opened[-1][1].write(f"{header}{field}\r\n\r\n{begun}".encode())
        refused = 0
        async with asyncio.timeout(30):
            for reader, _ in opened[64:]:
                refused += b" 429 " in await reader.readline()
        assert refused == len(opened) - 64
        response, _ = await ask(harness, bearer(BOB), user="x" * 100_000)
        assert response.status == 200
    finally:
        for _, writer in opened:
            writer.transport.abort()


# What ranks are told.


async def test_tenant_priority_and_deadline_outlive_a_death(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.hold_at = 2
    asked = asyncio.create_task(ask(harness, bearer(ALICE), priority=-5, timeout=600))
    (first,) = await submits_of(harness, 1)
    await asyncio.sleep(0.1)
    victim = next(rank for rank in harness.ranks if rank.submits)
    for rank in harness.ranks:
        rank.go()
    victim.hold_at = 2
    await victim.kill()
    response, answer = await asked
    assert answer["choices"][0]["token_ids"] == toy_tokens(PROMPT, 4)
    _, second = await submits_of(harness, 2)
    assert second.attempt == 1
    assert second.scheduling == first.scheduling
    assert (first.scheduling.tenant, first.scheduling.priority) == ("alice", -5)
    assert first.scheduling.deadline_at > 0
    assert len(first.scheduling.cache_salt) == 32
    assert response.status == 200


async def test_a_key_asks_for_no_more_urgency_than_it_may(harness: GatewayHarness) -> None:
    for key, priority, status in (
        (ALICE, -5, 200),
        (ALICE, -6, 400),
        (BOB, -1, 400),
        (BOB, 7, 200),
    ):
        response, answer = await ask(harness, bearer(key), priority=priority)
        assert response.status == status
        assert status == 200 or answer["error"]["param"] == "priority"


@pytest.mark.parametrize("how", ["field", "header"])
async def test_what_is_late_fails_and_leaves_its_rank(harness: GatewayHarness, how: str) -> None:
    for rank in harness.ranks:
        rank.hold_at = 2
    headers = bearer(ALICE) | ({"X-Request-Timeout": "1.5"} if how == "header" else {})
    response, answer = await ask(harness, headers, **({"timeout": 1.5} if how == "field" else {}))
    assert response.status == 504
    assert answer["error"]["code"] == "deadline_exceeded"
    async with asyncio.timeout(20):
        while not any(rank.cancels for rank in harness.ranks):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await harness.wait_metric("tokens_in_flight", 0)


async def test_a_late_stream_ends_with_an_error(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.hold_at = 2
    url, fields = harness.url + "/v1/completions", body(stream=True, timeout=1.5)
    async with harness.http.post(url, json=fields, headers=bearer(ALICE)) as response:
        assert response.status == 200
        lines = [line async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1].strip() == b"data: [DONE]"
    error = json.loads(lines[-2][6:])["error"]
    assert error["code"] == "deadline_exceeded"
    assert error["request_id"] == response.headers["X-Request-Id"]


async def test_keys_do_not_share_blocks_and_a_salt_divides_further(
    harness: GatewayHarness,
) -> None:
    for key, fields in (
        (ALICE, {}),
        (ALICE, {}),
        (BOB, {}),
        (BOB, {"cache_salt": "mine"}),
        (ALICE, {"cache_salt": "mine"}),
    ):
        await ask(harness, bearer(key), **fields)
    found = {(s.scheduling.tenant, s.scheduling.cache_salt) for s in await submits_of(harness, 5)}
    assert len({salt for _, salt in found}) == len(found) == 4


async def test_where_a_prompt_goes_tells_nothing_of_other_clients(harness: GatewayHarness) -> None:
    """The gateway prefers the rank that has served a prompt, for its own client only."""
    for _ in range(2):
        await ask(harness, bearer(ALICE), prompt=PROMPT * 4)
    places = [rank for rank in harness.ranks for _ in rank.submits]
    assert places[0] is places[1], "affinity works at all"
    busy = places[0]
    # Alice's next request holds a little of that rank: Bob, who has nothing there, goes elsewhere.
    busy.hold_at = 0
    held = asyncio.create_task(ask(harness, bearer(ALICE), prompt=PROMPT * 4))
    await submits_of(harness, 3)
    await ask(harness, bearer(BOB), prompt=PROMPT * 4)
    other = next(rank for rank in harness.ranks if rank is not busy)
    assert [s.scheduling.tenant for s in other.submits] == ["bob"]
    busy.go()
    await held


async def test_each_rank_is_told_of_clients_that_only_others_serve(
    harness: GatewayHarness,
) -> None:
    """Ranks step together: one that serves a single client must not fill its steps with it while
    another rank serves another."""
    for rank in harness.ranks:
        rank.hold_at = 1
    held = [asyncio.create_task(ask(harness, bearer(key))) for key in (ALICE, BOB)]
    await submits_of(harness, 2)
    async with asyncio.timeout(20):
        for rank in harness.ranks:
            while set(rank.tenants) != {"alice", "bob"}:
                rank.told_tenants.clear()
                await rank.told_tenants.wait()
    for rank in harness.ranks:
        rank.go()
    await asyncio.gather(*held)
    async with asyncio.timeout(20):
        for rank in harness.ranks:
            while rank.tenants:
                rank.told_tenants.clear()
                await rank.told_tenants.wait()


# Ids and logs.


async def test_a_request_is_named_in_its_answer_its_errors_and_the_log(
    harness: GatewayHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = {**bearer(ALICE), "X-Request-Id": "client-7/a.b"}
    response, _ = await ask(harness, sent)
    assert response.headers["X-Request-Id"] == "client-7/a.b"
    response, answer = await ask(harness, sent, n=-1)
    assert response.status == 400
    assert answer["error"]["request_id"] == response.headers["X-Request-Id"] == "client-7/a.b"
    made, _ = await ask(harness, {**bearer(ALICE), "X-Request-Id": "two words"})
    assert len(made.headers["X-Request-Id"]) == 32
    logged = capsys.readouterr().out
    lines = [line for line in logged.splitlines() if "client-7/a.b" in line]
    assert len(lines) == 2
    assert made.headers["X-Request-Id"] in logged
    assert "two words" not in logged


async def test_a_client_that_leaves_is_in_the_log_and_counts_no_more(
    harness: GatewayHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in harness.ranks:
        rank.hold_at = 1
    leaving = asyncio.create_task(ask(harness, bearer(ALICE)))
    await submits_of(harness, 1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await harness.wait_metric("tokens_in_flight", 0)
    await logged(capsys, "status=499")


async def test_tokenising_alone_counts_against_the_rate_too(model: Path, tmp_path: Path) -> None:
    text = f'[keys.k]\nhash = "{spelt_hash(ALICE)}"\nrequests_per_minute = 2\n'
    keys = write_keys(tmp_path / "keys.toml", text)
    async with running_gateway(model, api_key_file=keys, api_key=ALICE) as harness:
        statuses = []
        for path, fields in (
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [5]}),
            ("/tokenize", {"prompt": "x"}),
        ):
            url = harness.url + path
            async with harness.http.post(url, json=fields, headers=bearer(ALICE)) as response:
                statuses.append(response.status)
        assert statuses == [200, 200, 429]


def test_a_gateway_that_anybody_reaches_warns() -> None:
    """It has no etcd, and so it ends; it warns before."""
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "gateway", "--host", "0.0.0.0"),
            *("--port", "0", "--etcd", "127.0.0.1:1"),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "gateway_open_to_all" in ended.stderr
    assert "--api-key-file" in ended.stderr
