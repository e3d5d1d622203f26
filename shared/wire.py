"""Messages between gateway, ranks and control plane, and their framing over TCP.

A frame is a 4-byte big-endian length and a msgpack array `[kind, fields]`. The only place that
packs messages. Every message carries the ids that make a late copy harmless.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

import msgspec

from shared.codec import from_plain, pack_plain, to_plain, unpack_plain
from shared.errors import WireError
from shared.types import (
    Attempt,
    Epoch,
    FinishReason,
    Incarnation,
    Member,
    RankId,
    SamplingParams,
    SessionId,
    Step,
)

FRAME_BYTES_MAX = 16 << 20
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First frame of a connection, by the side that opened it. `role` is "gateway",
    "control_plane", "rank" or "cli"; `name` is unique per process. The rank answers with
    Welcome."""

    role: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    rank: RankId
    incarnation: Incarnation

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Place attempt `attempt` of a session. `tokens` is the prompt and all tokens already emitted,
    of which the last `num_emitted` were; the first new token has index `num_emitted`."""

    session: SessionId
    attempt: Attempt
    tokens: tuple[int, ...]
    num_emitted: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The session needs no more tokens (client gone, stop string found, or moved elsewhere)."""

    session: SessionId
    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely the model alone (before penalties, bias, temperature) found a token at its place:
    the natural logarithm of its probability, its rank among all (1 is the likeliest), and the
    likeliest ids with theirs, falling, as many as were asked for."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class SessionTokens(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one attempt. `index` is that of the first of `ids`; `finish` is set on the last
    message of an attempt, whose `ids` may be empty. A stop token is sent, too, as the last id
    beside `finish=STOP`: it counts as a token, and the gateway leaves it out of the text. `error`
    set means failed, and `retryable` that another rank may take it. `cached_tokens` says how many
    of the tokens given were found in the KV cache when the attempt began; it is set on the first
    message that has ids. `backup_rank` names the rank that keeps copies of its KV blocks, whenever
    that has changed since the last message; -1 says nothing.

    Where the sampling asks for them, `logprobs` holds one for each of `ids`, and `prompt_logprobs`
    come chunk by chunk before the first id: the first of them is that of the prompt's token
    `prompt_index`. The prompt's token 0 has none.

    No dataclass, but a Struct: it goes over the wire for every token, and so without the fields
    that have their defaults."""

    session: SessionId
    attempt: Attempt
    index: int
    ids: tuple[int, ...]
    finish: FinishReason | None = None
    error: str | None = None
    retryable: bool = False
    cached_tokens: int = 0
    backup_rank: int = -1
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A rank's load, for the gateway's choice."""

    running: int
    waiting: int
    tokens: int  # prompt and generated tokens of running and waiting sessions
    kv_blocks_free: int  # cached ones that nobody uses among them
    kv_blocks: int
    kv_blocks_cached: int = 0  # named: a later prompt may begin with them
    prefix_tokens: int = 0  # known tokens of all sequences that began to run, since the start
    prefix_tokens_cached: int = 0  # … of which the KV cache had these


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """All tokens that one committed step made for one gateway."""

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: Step
    sessions: tuple[SessionTokens, ...]
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """A rank vouches for itself by its event loop (it answers) and by its engine thread:
    `engine_age_ms` is the time since that thread last passed a heartbeat point (it beats while it
    waits for peers, too). `waiting_for` names the peers it waits for now."""

    nonce: int
    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: Step
    engine_age_ms: float
    waiting_for: tuple[RankId, ...]
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """Rank to rank: step `step` of `epoch` has work; leave the common sleep and take part."""

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBarrierUpdate:
    """Rank to rank, where ranks meet by counting the graphs that they launch: where the sender
    stands. The newest one replaces those before; see `gpu_worker/exchange/graph_barrier.py`."""

    member: Member
    joining: Epoch  # the newest map with joiners that it waits to adopt, or has adopted; 0: none
    limit: int  # graphs it had launched when it heard of that map; it launches no more on its own
    paused: Epoch  # the last of these maps whose joiners may be mapped: nothing is in flight here
    entered: Epoch  # the map that it runs under
    sleep_at: int  # it agrees to sleep once so many graphs are launched; -1: it does not
    slept_at: int  # where all had agreed to sleep the last time, as far as it knows; -1: nowhere
    invalidated: Epoch  # it will deliver no more step of this map, nor of an older one


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRegion:
    """Rank to rank: give me (`source`) a region of your memory to write my messages into. A higher
    `generation` asks for a fresh region, after a write into the old one timed out."""

    source: Member
    transfer_name: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOpened:
    """The region that the answering rank keeps for `source`: an address in its registered
    memory."""

    target: Member
    source: Member
    generation: int
    transfer_name: str
    address: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenKvReplicaRegion:
    """Rank to rank: give me (`source`) room in your host memory for copies of my KV blocks, of so
    many bytes each and in this layout. Every call has a higher `generation`, and gets fresh
    room."""

    source: Member
    generation: int
    layout: str
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReplicaRegionOpened:
    """Slot i of the answering rank's region begins at `address + i * block_bytes`; behind the last
    one is room for the write that opens the way. `refusal` says why there is none, where
    `num_slots` is 0."""

    target: Member
    source: Member
    generation: int
    transfer_name: str
    address: int
    num_slots: int
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReplicasStored:
    """Rank to rank: the blocks of these names stand in these slots of my region; the writes have
    completed."""

    source: Member
    generation: int
    slots: tuple[int, ...]
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DropKvReplicas:
    """Rank to rank: know these slots no more; I shall write to them after your answer."""

    source: Member
    generation: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReplicasDropped:
    source: Member
    generation: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusQuery:
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """One change of epoch as a rank lived it, in its `Clock.now()`; 0 where not reached."""

    epoch: Epoch
    seen_at: float  # the map arrived
    adopted_at: float  # the engine runs under it
    replayed_at: float  # its first step was committed
    abandoned: bool  # a step of the old epoch was thrown away
    reprefill_tokens: int = 0  # tokens of moved sessions prefilled since, until the next epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReply:
    nonce: int
    rank: RankId
    incarnation: Incarnation
    pid: int
    epoch: Epoch
    step: Step
    load: Load
    engine_age_ms: float
    steps_committed: int
    steps_abandoned: int
    tokens_generated: int
    adoptions: tuple[Adoption, ...]  # the last few, oldest first
    blocks_restored: int = 0  # KV blocks that were filled from copies


Message = (
    Hello
    | Welcome
    | Submit
    | Cancel
    | Tokens
    | Ping
    | Pong
    | Wake
    | GraphBarrierUpdate
    | OpenRegion
    | RegionOpened
    | OpenKvReplicaRegion
    | KvReplicaRegionOpened
    | KvReplicasStored
    | DropKvReplicas
    | KvReplicasDropped
    | StatusQuery
    | StatusReply
)

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Hello,
        Welcome,
        Submit,
        Cancel,
        Tokens,
        Ping,
        Pong,
        Wake,
        GraphBarrierUpdate,
        OpenRegion,
        RegionOpened,
        OpenKvReplicaRegion,
        KvReplicaRegionOpened,
        KvReplicasStored,
        DropKvReplicas,
        KvReplicasDropped,
        StatusQuery,
        StatusReply,
    )
}


def encode(message: Message) -> bytes:
    """The whole frame, length included. Raises WireError where it would exceed FRAME_BYTES_MAX."""
    body = pack_plain([type(message).__name__, to_plain(message)])
    if len(body) > FRAME_BYTES_MAX:
        raise WireError(f"message of {len(body)} bytes exceeds the limit of {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | memoryview) -> Message:
    """The message of a frame's body. Raises WireError on anything else."""
    plain = unpack_plain(body)
    if not isinstance(plain, list) or len(plain) != 2 or not isinstance(plain[0], str):
        raise WireError("malformed frame: not [kind, fields]")
    kind = _KINDS.get(plain[0])
    if kind is None:
        raise WireError(f"unknown message kind {plain[0]!r}")
    return from_plain(plain[1], kind)


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message, or None at a clean end of the stream. Raises WireError, ConnectionError."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > FRAME_BYTES_MAX:
            raise WireError(f"frame of {length} bytes exceeds the limit of {FRAME_BYTES_MAX}")
        return decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise WireError("the stream ended inside a frame") from error
        return None
