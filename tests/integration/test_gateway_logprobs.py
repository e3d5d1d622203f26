"""Log-probabilities, echo and several choices over HTTP: the shapes that OpenAI's client reads, and
numbers that lose no digit on their way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from gateway.detokenizer import TokenBytes
from tests.support.authentication import api_key
from tests.support.gateway_harness import MODEL, GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.toy_rank import EOS, toy_logprob, toy_tokens

PROMPT = [5, 6, 7, 30, 31]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def harness(model: Path) -> AsyncIterator[GatewayHarness]:
    async with running_gateway(model) as running:
        yield running


@pytest.fixture(autouse=True)
def no_script(harness: GatewayHarness) -> None:
    for rank in harness.ranks:
        rank.script = None
        rank.submits.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(harness: GatewayHarness) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=harness.url + "/v1", api_key=api_key()) as opened:
        yield opened


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, **fields}


async def complete(
    harness: GatewayHarness, path: str = "/v1/completions", **fields: Any
) -> dict[str, Any]:
    async with harness.http.post(harness.url + path, json=completion(**fields)) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def events(harness: GatewayHarness, **fields: Any) -> list[dict[str, Any]]:
    body = completion(stream=True, **fields)
    async with harness.http.post(harness.url + "/v1/completions", json=body) as response:
        lines = (await response.text()).splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def raw(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a byte-level token."""
    return TokenBytes(tokenizer.get_vocab(), frozenset()).join((token,))


async def test_a_chat_tells_each_token_with_its_bytes_and_the_likeliest(
    harness: GatewayHarness, client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Grow"}],
        max_tokens=6,
        logprobs=True,
        top_logprobs=2,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    choice = answer.choices[0]
    ids = choice.model_extra["token_ids"] if choice.model_extra else []
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == len(ids) == 6
    for token, said in zip(ids, choice.logprobs.content, strict=True):
        wanted = toy_logprob(token, 2)
        assert said.logprob == wanted.logprob
        assert bytes(said.bytes or ()) == raw(tokenizer, token)
        assert said.token == raw(tokenizer, token).decode(errors="replace")
        tops = [(bytes(t.bytes or ()), t.logprob) for t in said.top_logprobs]
        assert tops == [(raw(tokenizer, i), value) for i, value in wanted.top]


async def test_a_streamed_chat_tells_the_same(
    harness: GatewayHarness, client: openai.AsyncOpenAI
) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Grow"}],
        "max_tokens": 30,
        "logprobs": True,
        "top_logprobs": 1,
        "stop": ["zzzz"],
        "extra_body": {"ignore_eos": True},
    }
    whole = await client.chat.completions.create(**asked)
    streamed = []
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                streamed += choice.logprobs.content or []
    assert whole.choices[0].logprobs is not None
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == 30


async def test_logprobs_alone_have_no_top(
    harness: GatewayHarness, client: openai.AsyncOpenAI
) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2, logprobs=True
    )
    assert answer.choices[0].logprobs is not None
    assert [t.top_logprobs for t in answer.choices[0].logprobs.content or ()] == [[], []]
    plain = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2
    )
    assert plain.choices[0].logprobs is None


@pytest.mark.parametrize("num_top", [0, 3])
async def test_a_completion_tells_tokens_numbers_and_offsets(
    harness: GatewayHarness, client: openai.AsyncOpenAI, tokenizer: Tokenizer, num_top: int
) -> None:
    script = tokenizer.encode("Grüße, 星 and more").ids
    for rank in harness.ranks:
        rank.script = script
    answer = await client.completions.create(
        model=MODEL, prompt="The", max_tokens=len(script), logprobs=num_top
    )
    said = answer.choices[0].logprobs
    assert said is not None
    assert said.tokens is not None
    assert said.token_logprobs == [toy_logprob(token, 0).logprob for token in script]
    text, offsets = "", []
    for n in range(len(script)):
        offsets.append(len(text))
        text = tokenizer.decode(script[: n + 1]).rstrip("\ufffd")
    assert said.text_offset == offsets
    parts = [raw(tokenizer, token) for token in script]
    assert any(name.startswith("bytes:\\x") for name in said.tokens), "a character in parts"
    for name, part in zip(said.tokens, parts, strict=True):
        spelt = name.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
        assert part == (spelt if name.startswith("bytes:") else name.encode())
    for token, tops in zip(script, said.top_logprobs or (), strict=True):
        wanted = dict(toy_logprob(token, num_top).top)
        wanted.setdefault(token, toy_logprob(token, 0).logprob)
        assert sorted(tops.values()) == sorted(wanted.values())


async def test_a_streamed_completion_says_in_pieces_what_the_whole_says(
    harness: GatewayHarness,
) -> None:
    asked = {"logprobs": 2, "echo": True, "max_tokens": 20}
    whole = (await complete(harness, **asked))["choices"][0]
    pieces = [choice for event in await events(harness, **asked) for choice in event["choices"]]
    joined: dict[str, list[Any]] = {}
    for piece in pieces:
        for key, values in piece["logprobs"].items():
            joined.setdefault(key, []).extend(values)
    assert joined == whole["logprobs"]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]


async def test_an_echo_begins_with_the_prompt_and_its_scores(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    choice = (await complete(harness, echo=True, logprobs=1, return_token_ids=True))["choices"][0]
    ids = PROMPT + choice["token_ids"]
    assert choice["token_ids"] == toy_tokens(PROMPT, 6)
    assert choice["text"] == tokenizer.decode(ids)
    said = choice["logprobs"]
    assert said["token_logprobs"] == [None, *(toy_logprob(t, 0).logprob for t in ids[1:])]
    assert said["top_logprobs"][0] is None
    assert len(said["tokens"]) == len(said["text_offset"]) == len(ids)
    plain = (await complete(harness, echo=True))["choices"][0]
    assert plain["text"].startswith(tokenizer.decode(PROMPT))
    assert plain["logprobs"] is None


async def test_scoring_alone_gives_every_digit_and_no_token(harness: GatewayHarness) -> None:
    answer = await complete(harness, max_tokens=0, prompt_logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("", "length", None)
    assert choice["prompt_logprobs"][0] is None
    said = [
        entry[str(t)] for entry, t in zip(choice["prompt_logprobs"][1:], PROMPT[1:], strict=True)
    ]
    assert [s["logprob"] for s in said] == [toy_logprob(t, 0).logprob for t in PROMPT[1:]]
    assert [s["rank"] for s in said] == PROMPT[1:]
    assert answer["usage"]["completion_tokens"] == 0
    echoed = await complete(harness, max_tokens=0, echo=True, logprobs=0)
    numbers = echoed["choices"][0]["logprobs"]["token_logprobs"]
    assert numbers == [None, *(s["logprob"] for s in said)]


async def test_prompt_logprobs_name_the_likeliest_and_the_token(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    answer = await complete(harness, prompt_logprobs=2, logprobs=1, max_tokens=1)
    (choice,) = answer["choices"]
    for token, entry in zip(PROMPT[1:], choice["prompt_logprobs"][1:], strict=True):
        assert entry.keys() == {str(token), "100", "101"}
        assert entry["101"]["rank"] == 2
        name = raw(tokenizer, token).decode(errors="replace")
        assert entry[str(token)]["decoded_token"] == name
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2


async def test_a_chats_prompt_is_scored_beside_its_choices(harness: GatewayHarness) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Grow"}],
        "max_tokens": 2,
        "prompt_logprobs": 1,
    }
    async with harness.http.post(harness.url + "/v1/chat/completions", json=body) as response:
        answer = await response.json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in answer["choices"][0]


async def test_a_prompt_of_one_token_has_nothing_to_score(harness: GatewayHarness) -> None:
    (choice,) = (await complete(harness, prompt=[9], max_tokens=0, prompt_logprobs=3))["choices"]
    assert choice["prompt_logprobs"] == [None]


async def test_choices_come_prompt_by_prompt_and_draw_by_seeds_of_their_own(
    harness: GatewayHarness,
) -> None:
    answer = await complete(harness, prompt=[[5, 6], [8, 9]], n=3, seed=4, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[5, 6]] * 3 + [[8, 9]] * 3
    assert answer["usage"]["prompt_tokens"] == 4
    seeds = {(s.tokens, s.sampling.seed) for rank in harness.ranks for s in rank.submits}
    assert len(seeds) == 6
    assert len({seed for _, seed in seeds}) == 3
    assert ((5, 6), 4) in seeds
    streamed = await events(harness, n=3)
    assert {c["index"] for event in streamed for c in event["choices"]} == {0, 1, 2}


async def test_too_many_choices_are_refused(harness: GatewayHarness) -> None:
    body = completion(prompt=[[5]] * 3, n=100)
    async with harness.http.post(harness.url + "/v1/completions", json=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "n"


async def test_what_stops_a_text_and_special_tokens_can_be_shown(
    harness: GatewayHarness, tokenizer: Tokenizer
) -> None:
    script = [*tokenizer.encode("The quick fox").ids, EOS]
    for rank in harness.ranks:
        rank.script = script
    asked = {"max_tokens": 50, "ignore_eos": False}
    hidden = await complete(harness, **asked)
    shown = await complete(
        harness, include_stop_str_in_output=True, skip_special_tokens=False, **asked
    )
    stopped = await complete(harness, include_stop_str_in_output=True, stop=" qu", **asked)
    texts = [each["choices"][0]["text"] for each in (hidden, shown, stopped)]
    assert texts == ["The quick fox", "The quick fox<|end|>", "The qu"]
