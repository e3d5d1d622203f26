"""What reaches the ranks over HTTP, and what comes back of it: echoes of the text that was sent,
chats by the model's template, and special tokens that clients spell."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer, normalizers

from gateway.detokenizer import TokenBytes
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import build_tokenizer, write_tokenizer
from tests.support.toy_rank import toy_tokens

TEXTS = ("cafe\u0301", "5 \u2126", "<|end|>", "an <|begin|>arm\u1100\u1161 \uf900", "🌵")
CHAT = [{"role": "user", "content": "an arm"}]
GENERATED = 4

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One that changes what it encodes, as Qwen's does."""
    tokenizer = build_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def harness(model: Path) -> AsyncIterator[GatewayHarness]:
    async with running_gateway(model) as running:
        yield running


async def ask(
    harness: GatewayHarness, path: str, **fields: Any
) -> tuple[int, dict[str, Any], list[int]]:
    """Status, answer, and the prompt that a rank got."""
    for rank in harness.ranks:
        rank.submits.clear()
    body = {"model": MODEL, "max_tokens": GENERATED, "ignore_eos": True, **fields}
    async with harness.http.post(f"{harness.url}/v1/{path}", json=body) as response:
        answer = await response.json()
    prompts = [list(submit.tokens) for rank in harness.ranks for submit in rank.submits]
    return response.status, answer, prompts[0] if prompts else []


async def streamed(harness: GatewayHarness, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "max_tokens": GENERATED, "ignore_eos": True, "stream": True, **fields}
    async with harness.http.post(f"{harness.url}/v1/completions", json=body) as response:
        lines = (await response.text()).splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [choice for event in events for choice in event["choices"]]


@pytest.mark.parametrize("text", TEXTS)
async def test_an_echo_is_the_text_that_was_sent(
    harness: GatewayHarness, tokenizer: Tokenizer, text: str
) -> None:
    prompt = tokenizer.encode(text).ids
    answered = tokenizer.decode(toy_tokens(prompt, GENERATED), skip_special_tokens=True)
    _, answer, sent = await ask(harness, "completions", prompt=text, echo=True)
    assert sent == prompt
    assert answer["choices"][0]["text"] == text + answered
    pieces = await streamed(harness, prompt=text, echo=True)
    assert "".join(piece["text"] for piece in pieces) == text + answered


@pytest.mark.parametrize("text", TEXTS)
async def test_offsets_of_an_echo_lead_to_the_text_that_was_sent(
    harness: GatewayHarness, tokenizer: Tokenizer, text: str
) -> None:
    asked = {"prompt": text, "echo": True, "logprobs": 0}
    _, answer, prompt = await ask(harness, "completions", **asked)
    offsets = answer["choices"][0]["logprobs"]["text_offset"]
    assert len(offsets) == len(prompt) + GENERATED
    assert offsets == sorted(offsets)
    assert offsets[len(prompt)] == len(text)
    normal = tokenizer.normalizer.normalize_str
    for number in range(1, len(prompt)):
        begun = tokenizer.decode(prompt[:number], skip_special_tokens=False).rstrip("\ufffd")
        assert normal(text[: offsets[number]]) == begun
    pieces = [piece["logprobs"]["text_offset"] for piece in await streamed(harness, **asked)]
    assert [offset for piece in pieces for offset in piece] == offsets


async def test_ids_are_echoed_as_they_decode(harness: GatewayHarness, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("an arm<|end|> 🌵").ids[:-1]  # a character in parts
    _, answer, sent = await ask(harness, "completions", prompt=prompt, echo=True)
    assert sent == prompt
    whole = prompt + toy_tokens(prompt, GENERATED)
    assert answer["choices"][0]["text"] == tokenizer.decode(whole, skip_special_tokens=True)


async def test_a_chat_may_continue_its_last_message(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "It "}]
    fields = {"messages": messages, "continue_final_message": True}
    status, _, sent = await ask(harness, "chat/completions", **fields)
    assert status == 200
    text = "<|begin|>user\nan arm<|end|>\n<|begin|>assistant\nIt "
    assert sent == tokenizer.encode(text).ids
    status, answer, _ = await ask(harness, "chat/completions", add_generation_prompt=True, **fields)
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize(
    "fields",
    [
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        {"add_generation_prompt": True, "chat_template_kwargs": {"add_generation_prompt": False}},
    ],
)
async def test_a_chat_may_end_without_a_header(
    harness: GatewayHarness, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    _, _, sent = await ask(harness, "chat/completions", messages=CHAT, **fields)
    assert sent == tokenizer.encode("<|begin|>user\nan arm<|end|>\n").ids


async def test_a_request_brings_no_template(harness: GatewayHarness) -> None:
    status, answer, _ = await ask(
        harness, "chat/completions", messages=CHAT, chat_template="{{ messages }}"
    )
    assert (status, answer["error"]["param"]) == (400, "chat_template")
    assert "--chat-template" in answer["error"]["message"]


async def test_special_tokens_are_text_if_the_gateway_does_not_trust_them(
    harness: GatewayHarness, model: Path, tokenizer: Tokenizer
) -> None:
    text = "an<|end|><|begin|> arm"
    messages = [{"role": "user", "content": text}]
    end = tokenizer.token_to_id("<|end|>")
    _, _, trusted = await ask(harness, "completions", prompt=text)
    assert trusted.count(end) == 1
    async with running_gateway(model, trust_special_tokens=False) as distrusting:
        _, answer, prompt = await ask(distrusting, "completions", prompt=text, echo=True)
        _, _, chat = await ask(distrusting, "chat/completions", messages=messages)
    assert end not in prompt
    assert answer["choices"][0]["text"].startswith(text)
    assert chat.count(end) == 1, "the template's own"
    known = TokenBytes(tokenizer.get_vocab(), {0, 1})
    assert known.join(prompt).decode() == text


async def test_a_template_that_does_not_compile_leaves_completions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    async with running_gateway(tmp_path) as gateway:
        status, answer, _ = await ask(gateway, "chat/completions", messages=CHAT)
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert "does not compile" in answer["error"]["message"]
        assert (await ask(gateway, "completions", prompt="an arm"))[0] == 200
    assert "chat_template_unusable" in capsys.readouterr().out
