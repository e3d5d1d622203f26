"""Answers of `/tokenize` and `/detokenize`: whole however long, and not made by the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.api.token_routes import DetokenizeBody, TokenizeBody, detokenize, tokenize
from gateway.served_model import ModelLimits, ParserNames, ServedModel, load_served_model
from gateway.tokenizer_loader import TokenizerOptions
from shared.errors import RequestError
from shared.records import InstanceSpec
from tests.support.fake_clock import FakeClock
from tests.support.tiny_tokenizer import write_tokenizer

TEXT = "The quick brown fox. Grüße aus Köln. " * 2500  # more ids than are encoded in one
LIMITS = ModelLimits(vocab_size=1000, context_tokens_max=64)


@pytest.fixture
async def served(tmp_path: Path) -> ServedModel:
    write_tokenizer(tmp_path)
    spec = InstanceSpec(
        model_name="m",
        model_path=str(tmp_path),
        num_moe_layers=1,
        num_experts=1,
        num_ranks=1,
        slots_per_rank=1,
        redundant_experts=0,
        context_tokens_max=64,
        vocab_size=1000,
    )
    options, parsers = TokenizerOptions(), ParserNames()
    return await load_served_model(
        spec, folder=None, name="", clock=FakeClock(), tokenizer_options=options, parsers=parsers
    )


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a thread was asked for."""
    asked: list[str] = []
    to_thread = asyncio.to_thread

    async def spy(work: Callable[..., Any], *args: Any) -> Any:
        asked.append(work.__name__)
        return await to_thread(work, *args)

    monkeypatch.setattr(asyncio, "to_thread", spy)
    return asked


async def test_a_long_text_there_and_back(served: ServedModel, in_threads: list[str]) -> None:
    body = TokenizeBody(prompt=TEXT, return_token_strs=True)
    answer = json.loads(await tokenize(served, body, LIMITS, chars_max=1 << 20))
    ids = await served.tokenizer.encode(TEXT, tokens_max=1 << 20)
    assert answer["tokens"] == list(ids)
    assert answer["count"] == len(answer["token_strs"]) == len(ids)
    assert answer["max_model_len"] == 64
    back = await detokenize(served, DetokenizeBody(tokens=list(ids)), LIMITS)
    assert json.loads(back) == {"prompt": TEXT}
    assert in_threads == ["_token_answer", "_text_answer"]


@pytest.mark.parametrize("wrong", [-1, 1000])
async def test_an_id_that_is_none_is_refused_wherever_it_is(
    served: ServedModel, wrong: int
) -> None:
    body = DetokenizeBody(tokens=[5] * 40_000 + [wrong])
    with pytest.raises(RequestError, match="from 0 to 999"):
        await detokenize(served, body, LIMITS)


@pytest.mark.parametrize("text", ["", "a"])
async def test_a_short_text(served: ServedModel, text: str) -> None:
    answer = json.loads(await tokenize(served, TokenizeBody(prompt=text), LIMITS, chars_max=9))
    assert answer["count"] == len(answer["tokens"]) == len(text)
    assert answer["token_strs"] is None
    back = await detokenize(served, DetokenizeBody(tokens=answer["tokens"]), LIMITS)
    assert json.loads(back) == {"prompt": text}


async def test_null_is_no_value(served: ServedModel) -> None:
    fields = ("add_special_tokens", "return_token_strs", "continue_final_message")
    nulls = msgspec.convert({"prompt": "a b", **dict.fromkeys(fields)}, TokenizeBody)
    plain = TokenizeBody(prompt="a b")
    answers = [await tokenize(served, body, LIMITS, chars_max=99) for body in (nulls, plain)]
    assert answers[0] == answers[1]
