"""What becomes of long and of coded bodies: the same as of short ones, one at a time."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest
from msgspec.structs import replace

from gateway.api.bodies import CompletionBody
from gateway.api.body_decoder import BodyDecoder
from gateway.api.json_bounds import OBJECTS_MAX, UNCOUNTED_BYTES_MAX
from gateway.api.resumption import body_digest
from gateway.api_keys import ANYBODY
from gateway.preparation import WAITING_MAX
from shared.errors import Overloaded, RequestError
from shared.request_body import ContentCoding, RawBody

LIMIT = 1 << 20


def plain(**fields: object) -> RawBody:
    return RawBody(json.dumps({"prompt": "x", **fields}).encode(), None)


def coded(raw: RawBody) -> RawBody:
    return RawBody(gzip.compress(raw.data), ContentCoding.GZIP)


LONG = plain(y="z" * UNCOUNTED_BYTES_MAX, stream=True)


@pytest.mark.parametrize("raw", [LONG, coded(LONG)])
async def test_a_long_body_is_decoded_as_a_short_one_is(raw: RawBody) -> None:
    decoded = await BodyDecoder(LIMIT).decode(ANYBODY, raw, CompletionBody)
    assert decoded.body.prompt == "x"
    assert decoded.ignored == ["y"]
    assert decoded.num_bytes == len(LONG.data)
    assert decoded.digest == body_digest(LONG.data)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (plain(y=[[]] * (OBJECTS_MAX + 1)), "too_many_values"),
        (coded(plain(y=[[]] * (OBJECTS_MAX + 1))), "too_many_values"),
        (coded(plain(y="z" * LIMIT)), "request_too_large"),
        (RawBody(b"\xff" * 2 * UNCOUNTED_BYTES_MAX, None), "invalid_json"),
        (RawBody(b"no gzip", ContentCoding.GZIP), None),
    ],
)
async def test_what_is_wrong_is_refused_and_the_next_one_has_its_turn(
    raw: RawBody, code: str | None
) -> None:
    decoder = BodyDecoder(LIMIT)
    with pytest.raises(RequestError) as refused:
        await decoder.decode(ANYBODY, raw, CompletionBody)
    if code is not None:
        assert refused.value.code == code
    async with asyncio.timeout(30):
        assert (await decoder.decode(ANYBODY, LONG, CompletionBody)).body.prompt == "x"


async def test_short_bodies_wait_for_no_long_one() -> None:
    decoder = BodyDecoder(LIMIT)
    long = [asyncio.ensure_future(decoder.decode(ANYBODY, LONG, CompletionBody)) for _ in range(20)]
    await asyncio.sleep(0)
    short = asyncio.ensure_future(decoder.decode(ANYBODY, plain(), CompletionBody))
    assert (await short).body.prompt == "x"
    assert not all(each.done() for each in long)
    async with asyncio.timeout(30):
        await asyncio.gather(*long)


async def test_of_two_clients_one_does_not_wait_for_all_that_the_other_has_sent() -> None:
    decoder = BodyDecoder(LIMIT)
    many, few = (replace(ANYBODY, name=name) for name in ("many", "few"))
    sent = [asyncio.ensure_future(decoder.decode(many, LONG, CompletionBody)) for _ in range(20)]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await decoder.decode(few, LONG, CompletionBody)
        assert sum(each.done() for each in sent) <= 3
        await asyncio.gather(*sent)


async def test_no_more_long_ones_wait_than_there_are_places() -> None:
    decoder = BodyDecoder(LIMIT)
    waiting = [
        asyncio.ensure_future(decoder.decode(ANYBODY, LONG, CompletionBody))
        for _ in range(WAITING_MAX + 2)
    ]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
    assert [type(each.exception()) for each in done if each.exception()] == [Overloaded]
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
