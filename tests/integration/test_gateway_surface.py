"""The gateway's HTTP surface beside generation: methods, paths, browsers, bodies of any size, TLS,
the end of a gateway, and what it tells of itself."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.authentication import api_key
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.metrics import metric_value
from tests.support.tiny_tokenizer import write_tokenizer

ORIGIN = "https://chat.example.com"
BODY = {"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}
ROOM = {"max_output_tokens": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest_asyncio.fixture
async def harness(model: Path) -> AsyncIterator[GatewayHarness]:
    options = {"cors_origins": ORIGIN, "body_bytes_max": 10_000, "no_rank_timeout_s": 1.0}
    async with running_gateway(model, served_model_name="toy-moe,alias", **options) as running:
        yield running


async def call(
    harness: GatewayHarness, method: str, path: str, **options: Any
) -> tuple[int, Any, Any]:
    """(status, headers, JSON or None)"""
    async with harness.http.request(method, harness.url + path, **options) as response:
        is_json = response.content_type == "application/json" and method != "HEAD"
        return response.status, response.headers, await response.json() if is_json else None


async def raw(harness: GatewayHarness, sent: bytes) -> bytes:
    """What comes back on a connection of its own, up to its end or a second of silence after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(harness.url.split(":")[-1]))
    writer.write(sent)
    received = b""
    try:
        while chunk := await asyncio.wait_for(reader.read(65536), 1.0 if received else 30.0):
            received += chunk
    except TimeoutError:
        pass
    writer.close()
    return received


async def test_a_wrong_method_says_which_are_right(harness: GatewayHarness) -> None:
    status, headers, body = await call(harness, "GET", "/v1/completions")
    assert (status, headers["Allow"]) == (405, "POST")
    assert body["error"]["code"] == "method_not_allowed"
    status, headers, _ = await call(harness, "DELETE", "/v1/models")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


async def test_head_and_a_slash_at_the_end(harness: GatewayHarness) -> None:
    assert (await call(harness, "HEAD", "/v1/models"))[0] == 200
    assert (await call(harness, "GET", "/v1/models/"))[0] == 200
    _, _, stored = await call(harness, "POST", "/v1/responses", json={"input": "a", **ROOM})
    path = f"/v1/responses/{stored['id']}/"
    status, _, body = await call(harness, "GET", path + "?stream=true")
    assert (status, body["error"]["param"]) == (400, "stream")
    assert (await call(harness, "GET", path + "?stream=false"))[2] == stored
    assert (await call(harness, "DELETE", path))[2]["deleted"] is True
    status, _, body = await call(harness, "POST", "/v1/completions/", json=BODY)
    assert (status, body["usage"]["completion_tokens"]) == (200, 8)


@pytest.mark.parametrize(
    ("path", "why"),
    [("/v1/embeddings", "no embeddings"), ("/v1/rerank", "ranks no documents"), ("/v2", "Served:")],
)
async def test_what_is_not_served_is_a_404_that_says_what_is(
    harness: GatewayHarness, path: str, why: str
) -> None:
    status, _, body = await call(harness, "POST", path, json={})
    assert status == 404
    assert why in body["error"]["message"]
    assert "POST /v1/chat/completions" in body["error"]["message"]


async def test_browsers_of_the_origins_that_are_named(harness: GatewayHarness) -> None:
    ask = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    status, headers, _ = await call(harness, "OPTIONS", "/v1/chat/completions", headers=ask)
    assert "DELETE" in headers["Access-Control-Allow-Methods"], "for /v1/responses/{id}"
    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == ORIGIN
    assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    body = {**BODY, "stream": True}
    _, headers, _ = await call(
        harness, "POST", "/v1/completions", json=body, headers={"Origin": ORIGIN}
    )
    assert headers["Access-Control-Allow-Origin"] == ORIGIN
    stranger = {"Origin": "https://evil.example.com"}
    _, headers, _ = await call(harness, "GET", "/v1/models", headers=stranger)
    assert "Access-Control-Allow-Origin" not in headers
    for path in ("/v1/models", "/nothing"):  # no preflight, and one answer for every path
        status, headers, _ = await call(harness, "OPTIONS", path)
        assert (status, "POST" in headers["Allow"]) == (204, True)


async def test_a_body_that_is_too_large_is_refused_before_it_is_asked_for(
    harness: GatewayHarness,
) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"x-api-key: {api_key()}\r\n"
    large = f"{head}Content-Length: 20000\r\nExpect: 100-continue\r\n\r\n"
    assert (await raw(harness, large.encode())).startswith(b"HTTP/1.1 413")
    small = f"{head}Content-Length: 30\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    assert (await raw(harness, small.encode())).startswith(b"HTTP/1.1 100 Continue")
    odd = f"{head}Content-Length: 30\r\nExpect: magic\r\nConnection: close\r\n\r\n"
    assert (await raw(harness, odd.encode())).startswith(b"HTTP/1.1 417")
    named = large.replace("Host: x", "Host: x\r\nX-Request-Id: mine")
    answer = (await raw(harness, named.encode())).decode()
    assert "X-Request-Id: mine\r\n" in answer
    assert "Connection: close\r\n" in answer
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["request_id"] == "mine"
    message = named.replace("/v1/completions", "/v1/messages")
    answer = (await raw(harness, message.encode())).decode()
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["type"] == "request_too_large"
    await harness.wait_metric('requests_total{endpoint="/v1/completions",status="413"}', 2.0)


async def test_malformed_requests_leave_a_line_and_no_traceback(
    harness: GatewayHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
        answer = await raw(harness, sent)
        assert answer.split()[1] == b"400"
        assert b"Traceback" not in answer
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out


async def test_tokenize_and_detokenize(harness: GatewayHarness) -> None:
    asked = {"prompt": "hello", "return_token_strs": True}
    status, _, body = await call(harness, "POST", "/tokenize", json=asked)
    assert status == 200
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 2048
    _, _, back = await call(harness, "POST", "/detokenize", json={"tokens": body["tokens"]})
    assert back == {"prompt": "hello"}
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    _, _, of_chat = await call(harness, "POST", "/tokenize", json=chat)
    assert of_chat["count"] > body["count"]
    for wrong in ({}, {"prompt": "a", "messages": []}):
        assert (await call(harness, "POST", "/tokenize", json=wrong))[0] == 400
    assert (await call(harness, "POST", "/detokenize", json={"tokens": [-1]}))[0] == 400


async def test_what_a_gateway_tells_of_itself(harness: GatewayHarness) -> None:
    _, _, models = await call(harness, "GET", "/v1/models")
    assert [m["id"] for m in models["data"]] == [MODEL, "alias"]
    assert models["data"][0]["max_model_len"] == 2048
    assert (await call(harness, "POST", "/v1/completions", json={**BODY, "model": "alias"}))[
        0
    ] == 200
    assert (await call(harness, "GET", "/v1/models/alias"))[0] == 200
    assert (await call(harness, "GET", "/v1/models/other"))[0] == 404
    assert (await call(harness, "GET", "/version"))[2]["version"]
    assert (await call(harness, "GET", "/ping"))[0] == 200
    assert (await call(harness, "GET", "/load"))[2]["server_load"] == 0
    assert (await call(harness, "GET", "/get_model_info"))[2]["is_generation"] is True


async def test_metrics_in_both_formats(harness: GatewayHarness) -> None:
    await call(harness, "POST", "/v1/completions", json=BODY)
    async with harness.http.get(harness.url + "/metrics") as response:
        text = await response.text()
    assert "starfish_gateway_generated_tokens_total 8.0" in text
    endpoint = "/v1/completions"
    assert metric_value(text, "starfish_gateway_request_seconds_count", endpoint=endpoint) == 1.0
    assert metric_value(text, "vllm:generation_tokens_total", model_name=MODEL) == 8.0
    assert metric_value(text, "vllm:request_success_total", finished_reason="length") == 1.0
    assert metric_value(text, "vllm:num_requests_waiting", engine="none") == 0.0
    wanted = {"Accept": "application/openmetrics-text"}
    async with harness.http.get(harness.url + "/metrics", headers=wanted) as response:
        assert response.content_type == "application/openmetrics-text"
        assert (await response.text()).endswith("# EOF\n")


async def test_health_tells_a_recovery_and_ranks_that_stand_still(harness: GatewayHarness) -> None:
    assert (await call(harness, "GET", "/health"))[2]["state"] == "serving"
    await harness.ranks[1].kill()

    async def is_recovering() -> bool:
        return bool((await call(harness, "GET", "/health"))[2]["state"] == "recovering")

    await until(is_recovering)


async def test_a_session_whose_rank_stands_still_ends_with_a_reason(model: Path) -> None:
    async with running_gateway(model, num_ranks=1, no_rank_timeout_s=0.5) as harness:
        harness.ranks[0].hold_at = 2
        status, headers, body = await call(harness, "POST", "/v1/completions", json=BODY)
        assert (status, body["error"]["code"]) == (503, "stalled")
        assert headers["Retry-After"]


async def test_a_draining_gateway_refuses_new_requests_and_ends_streams(model: Path) -> None:
    async with running_gateway(model, num_ranks=1, drain_s=4.0) as harness:
        harness.ranks[0].hold_at = 2
        stream = {**BODY, "stream": True}
        async with harness.http.post(harness.url + "/v1/completions", json=stream) as response:
            harness.stop.set()
            await asyncio.sleep(0.1)
            status, headers, body = await call(harness, "POST", "/v1/completions", json=BODY)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert headers["Connection"] == "close"
            assert "shutting down" in body["error"]["message"]
            text = await response.text()
        assert "shutting_down" in text
        assert text.endswith("data: [DONE]\n\n")


def openssl(*words: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["openssl", *words], input=stdin, check=True, capture_output=True, text=True
    )
    return done.stdout


def make_certificate(folder: Path, name: str) -> None:
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", "1", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"),
        *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
    )


def served_subject(url: str) -> str:
    certificate = ssl.get_server_certificate(("127.0.0.1", int(url.split(":")[-1])))
    return openssl("x509", "-noout", "-subject", stdin=certificate)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


async def test_https_and_a_renewed_certificate(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificate(tmp_path, "first")
    monkeypatch.setattr("shared.server_certificate.RELOAD_S", 0.05)
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    async with running_gateway(model, num_ranks=1, scheme="https", **files) as harness:
        assert "first" in await asyncio.to_thread(served_subject, harness.url)
        assert (await call(harness, "POST", "/v1/completions", json=BODY))[0] == 200
        (tmp_path / "cert.pem").write_text("half of a renewal")
        await asyncio.sleep(0.2)
        assert "first" in await asyncio.to_thread(served_subject, harness.url)
        make_certificate(tmp_path, "second")

        async def is_renewed() -> bool:
            return "second" in await asyncio.to_thread(served_subject, harness.url)

        await until(is_renewed)


async def test_the_description_names_every_endpoint_and_its_fields(harness: GatewayHarness) -> None:
    _, _, document = await call(harness, "GET", "/openapi.json")
    assert document["openapi"].startswith("3.")
    assert "post" in document["paths"]["/v1/chat/completions"]
    schema = document["components"]["schemas"]["ChatBody"]
    assert schema["required"] == ["messages"]
    assert "temperature" in schema["properties"]
    assert document["paths"]["/v1/models/{name}"]["get"]["parameters"][0]["name"] == "name"
    async with harness.http.get(harness.url + "/docs") as response:
        assert response.content_type == "text/html"
        page = await response.text()
    assert "POST /v1/chat/completions" in page
    assert "<script" not in page
