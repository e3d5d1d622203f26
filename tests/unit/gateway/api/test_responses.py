"""What an answer and the chunks of a stream say of themselves and of their end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.api.responses import Choice, ChunkWriter, Header, Usage, response_body
from shared.types import FinishReason

HEADER = Header(id="a", created=1, model="m", fingerprint="fp_1", chat=True)
USAGE = Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=1)


def chunk_of(event: bytes) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.json.decode(event.removeprefix(b"data: "))
    return plain


@pytest.mark.parametrize("stop", ["###", 7, None])
def test_a_choice_says_what_stopped_it(stop: str | int | None) -> None:
    choice = Choice(
        text="x",
        token_ids=[3],
        prompt_ids=(2,),
        finish_reason="stop",
        stop=stop,
        logprobs=None,
        prompt_logprobs=None,
    )
    body = msgspec.json.decode(response_body(HEADER, [choice], USAGE, with_token_ids=False))
    assert body["choices"][0]["stop_reason"] == stop
    assert body["system_fingerprint"] == "fp_1"


@pytest.mark.parametrize("stop", ["###", 7, None])
def test_a_stream_says_what_stopped_a_choice_where_it_ends(stop: str | int | None) -> None:
    writer = ChunkWriter(HEADER, with_token_ids=False, include_usage=False)
    going = chunk_of(writer.delta_chunk(0, "x", [3], None))
    ended = chunk_of(writer.delta_chunk(0, "", [], FinishReason.STOP, stop=stop))
    assert "stop_reason" not in going["choices"][0]
    assert ended["choices"][0]["stop_reason"] == stop
    chunks = [going, ended, chunk_of(writer.role_chunk(0)), chunk_of(writer.usage_chunk(USAGE))]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_1"}
