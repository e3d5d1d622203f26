"""Two releases side by side: which serve together, what each ignores of the other, and how both
begin a connection."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator

import pytest

from shared.codec import pack_plain, to_plain, unpack
from shared.errors import OtherRelease
from shared.handshake import introduce, rank_caller
from shared.records import RankRecord, Verdict, unpack_rank, unpack_record
from shared.release import FIRST_RELEASE, Release, own_release, refusal
from shared.types import Operation, Role, SuspicionReason
from shared.wire import Challenge, Hello, Message, Ping, Pong, Proof, Welcome, encode, read_message
from tests.support.control_port import ACCESS, PEER, RANK, control_port, record_of

FUTURE = Release(version="9.0", protocol=90, protocol_min=80)


def of(protocol_min: int, protocol: int) -> Release:
    return Release(version="x", protocol=protocol, protocol_min=protocol_min)


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (of(1, 1), of(1, 4), True),
        (of(1, 3), of(3, 4), True),
        (of(1, 2), of(3, 4), False),
        (of(2, 5), of(3, 4), True),
    ],
)
def test_two_releases_serve_together_if_they_have_a_protocol_in_common(
    one: Release, other: Release, together: bool
) -> None:
    assert one.speaks_with(other) == other.speaks_with(one) == together


def test_a_refusal_names_both_releases_and_says_which_to_upgrade() -> None:
    text = refusal("rank 1", "rank 2", FUTURE)
    assert str(FUTURE) in text
    assert str(own_release()) in text
    assert "Upgrade rank 1 " in text
    assert "Upgrade rank 2 " in refusal("rank 1", "rank 2", FIRST_RELEASE)


# Records.


def test_a_record_of_the_first_release_has_its_protocol_and_unknown_fields_are_ignored() -> None:
    plain = to_plain(record_of(PEER, 7))
    del plain["release"]
    assert unpack(pack_plain(plain), RankRecord).release == FIRST_RELEASE
    plain["release"] = {**to_plain(own_release()), "of_the_future": [1]}
    plain["of_the_future"] = {"a": 1}
    assert unpack_rank(pack_plain(plain), "me").release == own_release()


def test_a_rank_of_another_release_is_refused_by_who_would_talk_to_it() -> None:
    plain = to_plain(record_of(PEER, 7)) | {"release": to_plain(FUTURE)}
    with pytest.raises(OtherRelease, match=r"this gateway.*rank 1\.1|rank 1\.1.*this gateway"):
        unpack_rank(pack_plain(plain), "this gateway")
    assert unpack_record(pack_plain(plain), RankRecord).release == FUTURE  # to be shown


def test_a_verdict_for_a_reason_that_only_a_newer_release_knows_is_a_verdict() -> None:
    plain = {
        **{"rank": 1, "incarnation": 2, "cause": "solar flare", "signals": []},
        **{"epoch": 3, "first_signal_at": 0.0, "decided_at": 0.0},
    }
    assert unpack(pack_plain(plain), Verdict).cause is SuspicionReason.OTHER


# Messages.


def frame(kind: str, fields: object) -> bytes:
    body = pack_plain([kind, fields])
    return len(body).to_bytes(4, "big") + body


async def test_an_unknown_kind_between_messages_is_passed_over_and_so_is_an_unknown_field() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(frame("OfTheFuture", {"a": [1, {"b": 2}]}))
    reader.feed_data(frame("Ping", {"nonce": 5, "of_the_future": True}))
    reader.feed_data(frame("OfTheFuture", None))
    reader.feed_eof()
    assert await read_message(reader) == Ping(nonce=5)
    assert await read_message(reader) is None


async def test_an_operation_that_only_a_newer_release_knows_still_says_how_long_it_takes() -> None:
    async with control_port() as port:
        connection = await port.enter_as_peer()
        connection.send(Ping(nonce=1))
        pong = await connection.next()
    assert isinstance(pong, Pong)
    plain = to_plain(pong) | {"announced": [{"operation": "pray", "at_most_ms": 9.0}]}
    reader = asyncio.StreamReader()
    reader.feed_data(frame("Pong", plain))
    found = await read_message(reader)
    assert isinstance(found, Pong)
    assert (found.announced[0].operation, found.announced[0].at_most_ms) == (Operation.OTHER, 9.0)


async def test_an_unknown_kind_from_a_peer_does_not_end_its_connection() -> None:
    async with control_port() as port:
        connection = await port.enter_as_peer()
        connection.writer.write(frame("OfTheFuture", {"a": 1}))
        assert await connection.is_served()


# Handshakes.


def first_proof(side: str, hello: dict[str, object], challenge: dict[str, object]) -> bytes:
    """As the first release makes it: of the fields that it knows."""
    return hmac.digest(ACCESS.secret, pack_plain([side, hello, challenge]), "sha256")


def hello_of_the_first_release() -> dict[str, object]:
    hello = Hello(role=Role.RANK, name="rank-1.1", instance="blue", nonce=b"n" * 16, member=PEER)
    plain: dict[str, object] = to_plain(hello)
    del plain["release"]
    return plain


def fields_of(message: Message | None, *names: str) -> dict[str, object]:
    assert message is not None
    return {name: to_plain(message)[name] for name in names}


CHALLENGE_FIELDS = ("instance", "rank", "incarnation", "nonce")


async def test_a_caller_of_the_first_release_is_let_in() -> None:
    async with control_port() as port:
        connection = await port.connect()
        hello = hello_of_the_first_release()
        connection.writer.write(frame("Hello", hello))
        challenge = fields_of(await connection.next(), *CHALLENGE_FIELDS)
        connection.send(Proof(proof=first_proof("caller", hello, challenge)))
        welcome = await connection.next()
        assert isinstance(welcome, Welcome)
        assert welcome.proof == first_proof("rank", hello, challenge)
        assert await connection.is_served()


async def test_a_caller_that_hides_its_release_cannot_use_its_proof_of_frames() -> None:
    """Who is between the two cannot make them prove less than both know."""
    async with control_port() as port:
        connection = await port.connect()
        hello = hello_of_the_first_release()
        stripped = frame("Hello", hello)
        connection.writer.write(stripped)
        challenge = await connection.next()
        assert isinstance(challenge, Challenge)
        said = pack_plain(["caller", stripped[4:], encode(challenge)[4:]])
        connection.send(Proof(proof=hmac.digest(ACCESS.secret, said, "sha256")))
        assert await connection.next() is None


async def test_a_rank_of_the_first_release_lets_us_in() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = fields_of(
            await read_message(reader),
            *("role", "name", "instance", "nonce", "name_key", "member"),
        )
        challenge: dict[str, object] = {
            **{"instance": "blue", "rank": RANK.rank, "incarnation": RANK.incarnation},
            "nonce": b"c" * 16,
        }
        writer.write(frame("Challenge", challenge))
        proof = await read_message(reader)
        assert isinstance(proof, Proof)
        if proof.proof == first_proof("caller", hello, challenge):
            welcome = {"proof": first_proof("rank", hello, challenge)}
            writer.write(frame("Welcome", {**challenge, **welcome}))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port: int = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await introduce(rank_caller(PEER), record_of(RANK, port), ACCESS, reader, writer)
        writer.close()


async def test_unknown_fields_in_a_handshake_are_ignored_and_proven() -> None:
    async with control_port() as port:
        connection = await port.connect()
        plain = hello_of_the_first_release() | {"of_the_future": 1}
        plain["release"] = to_plain(of(1, 90))
        hello = frame("Hello", plain)
        connection.writer.write(hello)
        challenge = await connection.next()
        assert isinstance(challenge, Challenge)
        said = pack_plain(["caller", hello[4:], encode(challenge)[4:]])
        connection.send(Proof(proof=hmac.digest(ACCESS.secret, said, "sha256")))
        assert isinstance(await connection.next(), Welcome)


async def test_a_rank_of_a_release_too_new_is_refused_with_both_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with control_port() as port:
        seen: Iterator[Release] = iter((own_release(), FUTURE))
        monkeypatch.setattr("shared.handshake.own_release", lambda: next(seen))
        with pytest.raises(OtherRelease) as refused:  # the caller asks first
            await port.enter_as_peer()
    assert str(FUTURE) in str(refused.value)
    assert str(own_release()) in str(refused.value)


async def test_a_caller_of_a_release_too_new_is_not_let_in() -> None:
    async with control_port() as port:
        connection = await port.connect()
        plain = hello_of_the_first_release() | {"release": to_plain(FUTURE)}
        hello = frame("Hello", plain)
        connection.writer.write(hello)
        challenge = await connection.next()
        assert isinstance(challenge, Challenge)
        said = pack_plain(["caller", hello[4:], encode(challenge)[4:]])
        connection.send(Proof(proof=hmac.digest(ACCESS.secret, said, "sha256")))
        assert await connection.next() is None
