"""Frames: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import WireError
from shared.types import (
    DEFAULT_SCHEDULING,
    Attempt,
    Epoch,
    Incarnation,
    Member,
    MemoryHandle,
    RankId,
    Role,
    SamplingParams,
    SchedulingParams,
    SessionId,
    Step,
    ThinkingBudget,
)
from shared.wire import (
    FRAME_BYTES_MAX,
    Hello,
    Load,
    Message,
    Ping,
    RegionOpened,
    SessionTokens,
    Submit,
    TokenLogprob,
    Tokens,
    decode,
    encode,
    read_message,
)


def submit(tokens: tuple[int, ...] = (1, 2, 3)) -> Submit:
    return Submit(
        session=SessionId("s"),
        attempt=Attempt(2),
        tokens=tokens,
        num_emitted=1,
        sampling=SamplingParams(
            temperature=0.5,
            seed=2**63,
            stop_token_ids=(7,),
            logit_bias=((3, -1.5),),
            bad_words=((1,), (2, 3)),
            allowed_token_ids=(4,),
            thinking_budget=ThinkingBudget(
                tokens=8, opened=True, start_ids=(), end_ids=(5,), forced_ids=(5, 6)
            ),
        ),
    )


def area() -> RegionOpened:
    return RegionOpened(
        target=Member(rank=RankId(1), incarnation=Incarnation(2)),
        source=Member(rank=RankId(0), incarnation=Incarnation(1)),
        generation=3,
        transfer_name="127.0.0.1:15000",
        address=2**63 + 5,
        nbytes=4096,
        memory=MemoryHandle(pid=77, fd=12, name="starfish-0123"),
    )


async def read_all(data: bytes) -> list[Message | None]:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    messages: list[Message | None] = []
    while not messages or messages[-1] is not None:
        messages.append(await read_message(reader))
    return messages


def tokens() -> Tokens:
    """Log-probabilities as they may be: exact to the last bit, and of what cannot be."""
    scored = TokenLogprob(logprob=-0.1 - 2**-55, rank=1, top=((7, -0.1), (9, float("-inf"))))
    session = SessionTokens(
        session=SessionId("s"),
        attempt=Attempt(0),
        index=4,
        ids=(7,),
        logprobs=(scored,),
        prompt_logprobs=(TokenLogprob(logprob=-1e-17, rank=2), scored),
        prompt_index=1,
    )
    load = Load(running=0, waiting=0, tokens=0, kv_blocks_free=1, kv_blocks=1)
    return Tokens(
        rank=RankId(0),
        incarnation=Incarnation(1),
        epoch=Epoch(1),
        step=Step(2),
        sessions=(session,),
        load=load,
    )


@pytest.mark.parametrize("message", [submit(), submit(()), area(), Ping(nonce=1), tokens()])
def test_a_message_comes_out_as_it_went_in(message: Message) -> None:
    assert decode(encode(message)[4:]) == message


async def test_a_stream_gives_its_messages_and_then_none() -> None:
    assert await read_all(encode(Ping(nonce=1)) + encode(submit())) == [
        Ping(nonce=1),
        submit(),
        None,
    ]


async def test_a_stream_that_ends_inside_a_frame_is_an_error() -> None:
    with pytest.raises(WireError, match="inside a frame"):
        await read_all(encode(submit())[:-1])


async def test_a_frame_that_claims_to_be_huge_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="exceeds the limit"):
        await read_all((FRAME_BYTES_MAX + 1).to_bytes(4, "big"))


def test_a_message_too_large_to_send_is_refused() -> None:
    with pytest.raises(WireError, match="exceeds the limit"):
        encode(Hello(role=Role.CLI, name="x" * (FRAME_BYTES_MAX + 1), instance="", nonce=b""))


@pytest.mark.parametrize(
    "plain",
    [
        None,
        ["Nothing", {}],
        ["Ping"],
        ["Ping", {}],
        ["Ping", {"nonce": "one"}],
        ["Submit", {"session": "s", "attempt": 0, "tokens": ["a"], "num_emitted": 0}],
    ],
)
def test_other_msgpack_is_a_wire_error(plain: object) -> None:
    with pytest.raises(WireError):
        decode(msgpack.packb(plain))


def test_a_submit_says_for_whom_it_is_and_without_that_it_is_for_nobody_in_particular() -> None:
    scheduling = SchedulingParams(
        tenant="t", weight=2.5, priority=-3, deadline_at=1.7e9, cache_salt=b"s" * 32
    )
    sent = dataclasses.replace(submit(), scheduling=scheduling)
    assert decode(encode(sent)[4:]) == sent
    plain = {"session": "s", "attempt": 0, "tokens": [1], "num_emitted": 0, "sampling": {}}
    found = decode(msgpack.packb(["Submit", plain]))
    assert isinstance(found, Submit)
    assert found.scheduling == DEFAULT_SCHEDULING


@pytest.mark.parametrize(
    "scheduling",
    [
        {"weight": 0.0},
        {"weight": -1.0},
        {"weight": math.inf},
        {"weight": math.nan},
        {"weight": 1e9},
        {"priority": 2**31},
        {"priority": -(2**31)},
        {"deadline_at": -1.0},
        {"deadline_at": math.nan},
        {"tenant": "x" * 65},
        {"cache_salt": b"x" * 33},
    ],
)
def test_numbers_that_would_upset_a_scheduler_are_a_wire_error(
    scheduling: dict[str, object],
) -> None:
    plain = {"session": "s", "attempt": 0, "tokens": [1], "num_emitted": 0, "sampling": {}}
    with pytest.raises(WireError):
        decode(msgpack.packb(["Submit", {**plain, "scheduling": scheduling}]))


@given(st.binary(max_size=64))
def test_random_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(WireError):
        decode(data)


@pytest.mark.parametrize("request_id", ["", "req-1", "a" * 128, "x/y:z@1=2+3_4.5"])
def test_a_request_id_that_can_stand_in_a_log_is_taken(request_id: str) -> None:
    sent = dataclasses.replace(submit(), request_id=request_id)
    assert decode(encode(sent)[4:]) == sent


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": "a" * 129},
        {"request_id": "two\nlines"},
        {"request_id": "end\n"},
        {"request_id": 'quo"te'},
        {"traceparent": "00-xyz"},
        {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n"},
    ],
)
def test_what_could_break_a_log_line_or_a_header_is_malformed(fields: dict[str, str]) -> None:
    with pytest.raises(WireError, match="malformed"):
        decode(encode(dataclasses.replace(submit(), **fields))[4:])  # type: ignore[arg-type]
