"""How a control connection begins. Both ends prove that they know the instance's secret, and the
caller says what it is, which decides what it may send.

    caller                                   rank
    Hello(role, name, instance, nonce) ────▶
                                       ◀──── Challenge(instance, rank, incarnation, nonce)
    Proof(HMAC of both)                ────▶
                                       ◀──── Welcome(instance, rank, incarnation, HMAC of both)

Challenge tells a caller that somebody else has taken over the address, before any proof. An
instance without a secret has an empty one: then the handshake only keeps instances apart. What
follows the handshake is neither encrypted nor signed.

Hello and Challenge say of which release the sender is. Whoever learns that the two cannot serve
together ends the connection, with both named in its error."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from shared.codec import pack_plain, to_plain
from shared.errors import AddressReused, OtherRelease, WireError
from shared.records import RankRecord
from shared.release import Release, own_release, refusal
from shared.types import Member, Role
from shared.wire import (
    LENGTH_BYTES,
    Challenge,
    Hello,
    Message,
    Ping,
    Pong,
    Proof,
    Welcome,
    decode,
    encode,
    read_frame,
    read_message,
)

M = TypeVar("M", bound=Message)

ANSWER_TIMEOUT_S = 2.0
HANDSHAKE_FRAME_BYTES_MAX = 1024
NONCE_BYTES = 16
NAME_KEY_BYTES = 16
_CALLER, _RANK = "caller", "rank"
_PROOF_OF_FRAMES = 2
"""The protocol since which a proof covers frames. Before, it covered the fields that both knew."""


@dataclass(frozen=True, slots=True)
class Access:
    """What belongs to one instance: its name, and the secret that its processes share. `repr` does
    not show the secret."""

    instance: str
    secret: bytes = b""

    def __repr__(self) -> str:
        return f"Access({self.instance!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The side that opens connections. `name` is unique per process. See the functions below."""

    role: Role
    name: str
    name_key: bytes = b""
    member: Member | None = None


def gateway_caller(prefix: str, name_key: bytes) -> Caller:
    """A name that ends in a hash of the key: who does not know the key cannot use the name, and so
    cannot touch the sessions of this gateway. Ranks alone are told the key."""
    name = f"{prefix}-{_name_ending(name_key)}"
    return Caller(role=Role.GATEWAY, name=name, name_key=name_key)


def rank_caller(member: Member) -> Caller:
    return Caller(role=Role.RANK, name=f"rank-{member}", member=member)


async def introduce(
    caller: Caller,
    peer: RankRecord,
    access: Access,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """The caller's side: returns when the rank of this record has let it in. Takes as long as the
    rank does. Raises AddressReused if somebody else answers, OtherRelease, WireError,
    ConnectionError."""
    where = f"{peer.control_host}:{peer.control_port}"
    hello = Hello(
        role=caller.role,
        name=caller.name,
        instance=access.instance,
        nonce=secrets.token_bytes(NONCE_BYTES),
        name_key=caller.name_key,
        member=caller.member,
        release=own_release(),
    )
    frame = encode(hello)
    writer.write(frame)
    body = await _read_answer(reader, Challenge, where)
    challenge = _decode_answer(body, Challenge, where)
    said = _Said(hello, frame[LENGTH_BYTES:], challenge, body, challenge.release)
    if (challenge.instance, challenge.member) != (access.instance, peer.member):
        raise AddressReused(
            f"{where} is not rank {peer.member} of {access.instance!r}, but rank "
            f"{challenge.member} of {challenge.instance[:64]!r}"
        )
    if not challenge.release.speaks_with(hello.release):
        raise OtherRelease(
            refusal(f"this {caller.role.value}", f"rank {peer.member}", challenge.release)
        )
    writer.write(encode(Proof(proof=said.proof(access, _CALLER))))
    welcome = _decode_answer(await _read_answer(reader, Welcome, where), Welcome, where)
    if not hmac.compare_digest(welcome.proof, said.proof(access, _RANK)):
        raise WireError(f"{where} does not know this instance's secret")


async def open_link(
    peer: RankRecord,
    own: Member,
    access: Access,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """How a rank begins a connection to a peer, which must also be ready to answer probes. Raises
    AddressReused, WireError, TimeoutError, ConnectionError."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await introduce(rank_caller(own), peer, access, reader, writer)
    writer.write(encode(Ping(nonce=0)))
    await expect(reader, Pong)


async def admit(
    member: Member, access: Access, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[Caller, Welcome]:
    """The rank's side, up to the Welcome, which the caller of this function sends. Reads small
    frames only. Raises WireError if the caller does not belong to the instance, OtherRelease,
    ConnectionError."""
    body = await read_frame(reader, bytes_max=HANDSHAKE_FRAME_BYTES_MAX)
    hello = None if body is None else decode(body)
    if body is None or not isinstance(hello, Hello):
        raise WireError("the first frame must be Hello")
    challenge = Challenge(
        instance=access.instance,
        rank=member.rank,
        incarnation=member.incarnation,
        nonce=secrets.token_bytes(NONCE_BYTES),
        release=own_release(),
    )
    frame = encode(challenge)
    writer.write(frame)
    said = _Said(hello, body, challenge, frame[LENGTH_BYTES:], hello.release)
    answer = await read_frame(reader, bytes_max=HANDSHAKE_FRAME_BYTES_MAX)
    if not hello.release.speaks_with(challenge.release):
        raise OtherRelease(refusal(f"rank {member}", f"a {hello.role.value}", hello.release))
    if answer is None:
        raise ConnectionError("it has gone after Challenge")
    proof = decode(answer)
    if not isinstance(proof, Proof):
        raise WireError("the second frame must be Proof")
    if hello.instance != access.instance:
        raise WireError(f"it belongs to the instance {hello.instance!r}")
    if not hmac.compare_digest(proof.proof, said.proof(access, _CALLER)):
        raise WireError("it does not know this instance's secret")
    welcome = Welcome(
        instance=access.instance,
        rank=member.rank,
        incarnation=member.incarnation,
        proof=said.proof(access, _RANK),
    )
    return _caller_of(hello), welcome


def _caller_of(hello: Hello) -> Caller:
    """Raises WireError if it may not have this name."""
    if hello.role is Role.GATEWAY and not (
        len(hello.name_key) == NAME_KEY_BYTES
        and hello.name.endswith(f"-{_name_ending(hello.name_key)}")
    ):
        raise WireError(f"{hello.name!r} is the name of another gateway")
    if (hello.role is Role.RANK) != (hello.member is not None):
        raise WireError("a rank, and nobody else, says which member it is")
    return Caller(role=hello.role, name=hello.name, name_key=hello.name_key, member=hello.member)


def _name_ending(name_key: bytes) -> str:
    return hashlib.sha256(name_key).hexdigest()[:24]


class _Said(NamedTuple):
    """What both have said before they prove anything, and the bodies of the frames in which they
    did. `other` is the release of the other side."""

    hello: Hello
    hello_body: bytes
    challenge: Challenge
    challenge_body: bytes
    other: Release

    def proof(self, access: Access, side: str) -> bytes:
        """Covers all that was said, and which of them says this."""
        if self.other.protocol >= _PROOF_OF_FRAMES:
            said = pack_plain([side, self.hello_body, self.challenge_body])
        else:
            said = pack_plain([side, _first_fields(self.hello), _first_fields(self.challenge)])
        return hmac.digest(access.secret, said, "sha256")


def _first_fields(message: Hello | Challenge) -> dict[str, Any]:
    """Those that a release of protocol 1 knows: it does not see the others."""
    plain: dict[str, Any] = to_plain(message)
    return {name: value for name, value in plain.items() if name != "release"}


async def _read_answer(reader: asyncio.StreamReader, kind: type[Message], where: str) -> bytes:
    body = await read_frame(reader, bytes_max=HANDSHAKE_FRAME_BYTES_MAX)
    if body is None:
        raise WireError(
            f"{where} closed the connection before {kind.__name__}: it knows why, and if the "
            "secrets or the releases differ, its log says so"
        )
    return body


def _decode_answer(body: bytes, kind: type[M], where: str) -> M:
    message = decode(body)
    if not isinstance(message, kind):
        raise WireError(f"{where} answered {type(message).__name__}, not {kind.__name__}")
    return message


async def expect(
    reader: asyncio.StreamReader, kind: type[M], timeout_s: float = ANSWER_TIMEOUT_S
) -> M:
    """The next message. Raises WireError if it is of another kind or the stream ends, and
    TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        message = await read_message(reader)
    if not isinstance(message, kind):
        got = "the end of the stream" if message is None else type(message).__name__
        raise WireError(f"expected {kind.__name__}, got {got}")
    return message
