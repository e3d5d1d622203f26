"""Messages between gateway, ranks and control plane, and their framing over TCP.

A frame is a 4-byte big-endian length and a msgpack array `[kind, fields]`. The only place that
packs messages. Every message carries the ids that make a late copy harmless. What a newer release
may change is said in `shared.release`.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.codec import pack_plain, to_plain
from shared.errors import UnknownKind, WireError
from shared.release import FIRST_RELEASE, Release
from shared.types import (
    DEFAULT_SCHEDULING,
    Attempt,
    Epoch,
    FinishReason,
    Incarnation,
    Member,
    MemoryHandle,
    Operation,
    RankId,
    RequestId,
    Role,
    SamplingParams,
    SchedulingParams,
    SessionId,
    Step,
    TenantName,
    Traceparent,
)

FRAME_BYTES_MAX = 16 << 20
_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first frame of a connection, from the side that opened it, which says what it is and
    which instance it means. `name` is unique per process; `name_key` is what a gateway's name was
    made from, and `member` is set by a rank. The rank answers with Challenge. See
    `shared.handshake`."""

    role: Role
    name: str
    instance: str
    nonce: bytes
    name_key: bytes = b""
    member: Member | None = None
    release: Release = FIRST_RELEASE


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """Who answers, which Welcome proves, and what the caller's Proof must cover."""

    instance: str
    rank: RankId
    incarnation: Incarnation
    nonce: bytes
    release: Release = FIRST_RELEASE

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """That the caller knows the instance's secret."""

    proof: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The caller is let in. Proves that the rank knows the instance's secret too."""

    instance: str
    rank: RankId
    incarnation: Incarnation
    proof: bytes

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Starts an attempt of a session. `tokens` is the prompt followed by the `num_emitted` tokens
    that the client has already; the first new token has index `num_emitted`.

    `stream_key` is empty, or names the stream whichever gateway has it: if the rank has a session
    of this key, tenant, prompt and sampling, it goes on for this gateway and no other, and its
    tokens from `num_emitted` on come at once. `request_id` names the client's request in logs;
    `traceparent` is W3C's and says of which trace the attempt is a part, if of any. Neither changes
    what is generated."""

    session: SessionId
    attempt: Attempt
    tokens: tuple[int, ...]
    num_emitted: int
    sampling: SamplingParams
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    stream_key: Annotated[bytes, Meta(max_length=32)] = b""
    request_id: RequestId = ""
    traceparent: Traceparent = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The attempt needs no more tokens: the client is gone, a stop string was found, or the session
    moved to another rank."""

    session: SessionId
    attempt: Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The natural logarithm of a token's probability according to the model alone, before
    penalties, bias and temperature. `rank` is its place among all tokens, 1 for the likeliest.
    `top` lists the likeliest ids with their log-probabilities, likeliest first, as many as were
    asked for."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class SessionTokens(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one attempt.

    `index` is that of the first of `ids`. `finish` is set on the last message of an attempt, whose
    `ids` may be empty. A stop token is sent too, as the last id with `finish=STOP`: it counts as a
    token, and the gateway leaves it out of the text. If `error` is set, the attempt failed; if
    `retryable` is set as well, another rank may take the session, and if `invalid` is set, the
    request itself is at fault. `cached_tokens` is the number of submitted tokens that the KV cache
    held when the attempt began, and `queued_ms` how long it had waited until then; the first
    message with ids has both. `backup_rank` names the rank that keeps the session's KV replicas,
    whenever it has changed since the last message; -1 means no change. `taken_over`: the attempt
    goes on with a session that another gateway had here.

    If the sampling parameters ask for them, `logprobs` holds one entry for each of `ids`, and
    `prompt_logprobs` come in chunks before the first id: the first entry of a chunk is that of the
    prompt's token `prompt_index`. The prompt's token 0 has none.

    A Struct and not a dataclass, so that fields with default values are left out: a message is sent
    for every token."""

    session: SessionId
    attempt: Attempt
    index: int
    ids: tuple[int, ...]
    finish: FinishReason | None = None
    error: str | None = None
    retryable: bool = False
    invalid: bool = False
    cached_tokens: int = 0
    queued_ms: float = 0.0
    backup_rank: int = -1
    taken_over: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatePeer:
    """How long a rank waits in an average step for a peer that comes later than most."""

    rank: RankId
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A rank's load, by which the gateway chooses a rank."""

    running: int
    waiting: int
    tokens: int  # prompt and generated tokens of running and waiting sessions
    kv_blocks_free: int  # including cached blocks that no session uses
    kv_blocks: int
    kv_blocks_cached: int = 0  # a later prompt with the same prefix can reuse them
    prefix_tokens: int = 0  # tokens of all sequences at the time they began to run, since the start
    prefix_tokens_cached: int = 0  # how many of those the KV cache held
    kv_replicas_rejected: int = 0  # kept here for peers, and not what their source had written
    step_ms: float = 0.0  # an average step, and for how much of it this rank waits for peers;
    waited_ms: float = 0.0  # 0: unknown
    late_peers: tuple[LatePeer, ...] = ()  # the latest ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """All tokens that one committed step generated for one gateway."""

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: Step
    sessions: tuple[SessionTokens, ...]
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Gateways also tell whose sessions they have in flight, on whichever rank: all ranks step
    together, so each must know of tenants that only others serve. Two names tell any tenant whether
    there is another, so no more are sent. They hold until the next Ping that has some; None says
    nothing."""

    nonce: int
    tenants: Annotated[tuple[TenantName, ...], Meta(max_length=2)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedOperation:
    """It has begun or is about to, and ends `at_most_ms` from now."""

    operation: Operation
    at_most_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnheardPeer:
    """A peer that was asked over the sender's link to it, and has not answered for so long beyond
    what answers usually take."""

    rank: RankId
    for_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to a Ping shows that the rank's event loop runs. `engine_age_ms` shows whether its
    engine thread does: it is the time since that thread last passed a heartbeat point, which it
    does while it waits for peers as well. `waiting_for` names the peers that it waits for now.
    `out_of_step` is the map under which a CUDA graph of it has ended without a member that may
    live, so that it can go on only as a joiner; 0 if there is none. `announced` is what may keep
    the rank from answering from now on: when that changes, control planes get a Pong with nonce 0
    unasked. `unheard` are peers that it waits for and that do not answer it. `left_out` are members
    that maps of this rank have left out, and on whom it has seen no verdict: a leader that has not
    made these maps must not take them for members."""

    nonce: int
    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: Step
    engine_age_ms: float
    waiting_for: tuple[RankId, ...]
    load: Load
    out_of_step: Epoch = Epoch(0)
    announced: tuple[AnnouncedOperation, ...] = ()
    left_out: tuple[Member, ...] = ()
    unheard: tuple[UnheardPeer, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """Rank to rank: step `step` of `epoch` has work, so a sleeping rank must wake and take part."""

    rank: RankId
    incarnation: Incarnation
    epoch: Epoch
    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBarrierUpdate:
    """Rank to rank, if ranks meet by counting the CUDA graphs that they launch: the sender's state.
    A newer one replaces all before it. See `gpu_worker/exchange/graph_barrier.py`."""

    member: Member
    joining: Epoch  # the newest map with joiners that it waits to adopt, or has adopted; 0: none
    limit: int  # graphs launched when it heard of that map; it launches no more by itself
    paused: Epoch  # the last such map whose joiners' memory may be mapped: nothing is in flight
    entered: Epoch  # the map that it runs under
    sleep_at: int  # it agrees to sleep once this many graphs are launched; -1: it does not
    slept_at: int  # the count at which all last agreed to sleep, as far as it knows; -1: never
    invalidated: Epoch  # it will deliver no more steps of this map or an older one
    launched: int  # graphs, when it last told so: while those in flight cannot be delivered


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRegion:
    """Rank to rank: `source` asks for a region of the receiver's memory, to write its messages
    into. A higher `generation` asks for a new region, after a write into the old one timed out."""

    source: Member
    transfer_name: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOpened:
    """The answer: the region that `target` keeps for `source`, at `address` in the memory that it
    registered, `nbytes` long. A source that can open `memory` writes into it without a network."""

    target: Member
    source: Member
    generation: int
    transfer_name: str
    address: int
    nbytes: int
    memory: MemoryHandle | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenKvReplicaRegion:
    """Rank to rank: `source` asks for a region of the receiver's host memory for replicas of its KV
    blocks, of `block_bytes` each and in this `layout`. Every request has a higher `generation` and
    gets a new region."""

    source: Member
    generation: int
    layout: str
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReplicaRegionOpened:
    """The answer: slot i of the region begins at `address + i * block_bytes`. After the last slot
    there is space for the first write, which opens the data path. If `num_slots` is 0, there is no
    region, and `refusal` says why."""

    target: Member
    source: Member
    generation: int
    transfer_name: str
    address: int
    num_slots: int
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReplicasStored:
    """Rank to rank: these slots of the sender's region hold the blocks with these names; the writes
    have completed. What a slot holds is believed only if it fits its tag."""

    source: Member
    generation: int
    slots: tuple[int, ...]
    names: tuple[bytes, ...]
    tags: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DropKvReplicas:
    """Rank to rank: the receiver must forget these slots; the sender overwrites them after the
    answer."""

    source: Member
    generation: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvReplicasDropped:
    source: Member
    generation: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferMap:
    """Control plane to rank, while etcd cannot be written: the map that follows, as etcd would hold
    it (`shared.records.pack_map`). A map of an older epoch than the rank's changes nothing."""

    expert_map: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusQuery:
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """One change of epoch on one rank. Times are its `Clock.now()` in seconds; 0 if not reached."""

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
    blocks_restored: int = 0  # KV blocks that were filled from KV replicas
    memory_links: tuple[Member, ...] = ()  # peers to which it writes through shared memory
    tokens_drafted: int = 0  # that a step has verified
    drafts_accepted: int = 0  # those of them that were right


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCountsQuery:
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """The answer: what the rank has counted since its incarnation began. Little-endian uint32,
    modulo 2³²; empty if nobody counts.

    `chosen` is `[L, E]`, with `num_experts` E: pairs of a token of this rank and an expert.
    `computed` is `[L]`: pairs that this rank's slots computed. `spread` says whether the replicas
    of an expert share its tokens."""

    nonce: int
    rank: RankId
    incarnation: Incarnation
    spread: bool
    num_experts: int
    chosen: bytes
    computed: bytes


Message = (
    Hello
    | Challenge
    | Proof
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
    | OfferMap
    | StatusQuery
    | StatusReply
    | ExpertCountsQuery
    | ExpertCounts
)

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Hello,
        Challenge,
        Proof,
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
        OfferMap,
        StatusQuery,
        StatusReply,
        ExpertCountsQuery,
        ExpertCounts,
    )
}

_FRAME = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_DECODERS = {kind: msgspec.msgpack.Decoder(kind) for kind in _KINDS.values()}


def encode(message: Message) -> bytes:
    """The whole frame, length included. Raises WireError if its body exceeds FRAME_BYTES_MAX."""
    body = pack_plain([type(message).__name__, to_plain(message)])
    if len(body) > FRAME_BYTES_MAX:
        raise WireError(f"message of {len(body)} bytes exceeds the limit of {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | memoryview) -> Message:
    """The message in a frame's body. Raises UnknownKind, or WireError if it is malformed. Nothing
    is built that the kind's fields do not ask for: a small frame of other things would become large
    objects."""
    try:
        name, fields = _FRAME.decode(body)
        kind = _KINDS.get(name)
        if kind is None:
            raise UnknownKind(f"unknown message kind {name[:64]!r}")
        return _DECODERS[kind].decode(fields)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"malformed frame: {error}") from error


async def read_message(
    reader: asyncio.StreamReader, *, bytes_max: int = FRAME_BYTES_MAX
) -> Message | None:
    """The next message of a kind that is known, or None at a clean end of the stream. A newer
    release may send others. Raises as `read_frame`."""
    while (body := await read_frame(reader, bytes_max=bytes_max)) is not None:
        with contextlib.suppress(UnknownKind):
            return decode(body)
    return None


async def read_frame(reader: asyncio.StreamReader, *, bytes_max: int) -> bytes | None:
    """The body of the next frame, or None at a clean end of the stream. Raises WireError, also for
    a frame of more than `bytes_max` bytes, whose body is not read, and ConnectionError."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > bytes_max:
            raise WireError(f"frame of {length} bytes exceeds the limit of {bytes_max}")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise WireError("the stream ended inside a frame") from error
        return None
