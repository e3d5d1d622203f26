"""The values that etcd holds under the keys of `shared.keys`. Ranks find each other through these
records, so that no rank is special."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.codec import pack, pack_plain, unpack, unpack_plain
from shared.errors import OtherRelease, WireError
from shared.expert_map import ExpertMap, Placement
from shared.release import FIRST_RELEASE, Release, own_release, refusal
from shared.types import (
    Epoch,
    Incarnation,
    Member,
    NodeId,
    ProcessState,
    RankId,
    RankState,
    Step,
    SuspicionReason,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """What the instance serves, and how large it is meant to be. The leading control plane writes
    it, and replaces it only while no rank is registered."""

    model_name: str
    model_path: str
    num_moe_layers: int
    num_experts: int
    num_ranks: int
    slots_per_rank: int  # slots of every rank in each layer, spare ones included
    redundant_experts: int  # replicas per layer, beyond one of each expert, when no rank is missing
    context_tokens_max: int
    vocab_size: int
    weights: str = ""  # `weights_identity` of the checkpoint; empty: nobody has looked
    ranks_max: int = 0  # how many ranks the exchange buffers of cards have room for; 0: num_ranks
    speculative_tokens: int = 0  # that every rank drafts for a sequence and verifies in one step

    @property
    def capacity(self) -> int:
        """How many ranks the exchange buffers of cards are made for. CPU ranks may become more."""
        return max(self.num_ranks, self.ranks_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeHandles:
    """What a peer must know to write into a CUDA rank's exchange buffer: RDMA keys and queue pairs
    if the host has an RDMA adapter, and the CUDA IPC handle for ranks of the same host. The
    buffer's layout follows from `step_tokens_max`, which all ranks of an instance must share.
    `buffer_id` is of this buffer alone: two incarnations that tell the same one share its memory,
    one after the other, so that it need not be mapped anew."""

    host: str
    address: int
    remote_key: int
    subnet_prefix: int
    interface_id: int
    queue_pairs: tuple[int, ...]
    local_ids: tuple[int, ...]
    ipc_handle: tuple[int, ...]
    step_tokens_max: int
    buffer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """One incarnation of a rank. The rank keeps it in etcd under its lease, and writes it again
    whenever its links, its state or its lease change."""

    rank: RankId
    incarnation: Incarnation
    node: NodeId
    pid: int
    lease_id: int
    state: RankState
    control_host: str
    control_port: int  # TCP, for sessions, probes and links; messages of `shared.wire`
    transfer_name: str  # the Mooncake segment, `host:port`; no other incarnation has the same
    slots: int
    kv_blocks: int
    kv_block_tokens: int
    exchange: str  # "transfer", "ep", "ep-fp8" or "none"
    links: tuple[Member, ...] = ()  # peers to which this rank has an open link; not the way back
    started_at: float = 0.0  # Unix seconds
    exchange_handles: ExchangeHandles | None = None  # only with "ep" and "ep-fp8"
    leaving: bool = False  # it was told to end, and waits until it has been drained
    first_incarnation: Incarnation = Incarnation(0)  # of its process; 0: an older release
    computes_on_demand: bool = False  # experts without a slot: see `ExpertMap.on_demand`
    release: Release = FIRST_RELEASE
    sessions_max: int = 0  # that run and wait here; 0: an older release
    kv_cache_dtype: str = "auto"  # or "fp8": a session's tokens depend on it

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotContents:
    """The expert in each slot of one rank: what it holds (`residents/`), or what it is to load
    (`assignments/`).

    `slots` is `[num_layers, slots_per_rank]` little-endian int16; a slot without an expert has
    EMPTY_SLOT. An assignment's `epoch` is that of the newest map when it was decided; residents
    have 0. An assignment may name another expert than the map of that epoch does: then an orphan
    replaces a surplus replica after a death.

    A member's assignments are counted from 1 (`number`). Residents have the number of the newest
    one that the rank knows, 0 before the first, and count what that one has it load as empty
    already. `disputed` slots of an assignment, `[num_layers, slots_per_rank]` bytes 0 or 1, or none
    of them if it is empty, are those for which an earlier assignment, which the rank had not said
    that it knows, wanted another expert than was resident: it may be loading that one. A release
    that does not count has None.
    """

    rank: RankId
    incarnation: Incarnation
    num_layers: int
    slots: bytes
    epoch: Epoch = Epoch(0)
    number: int | None = None
    disputed: bytes = b""

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)

    def disputed_slots(self) -> NDArray[np.bool_]:
        """`[num_layers, slots_per_rank]`. Raises WireError if `slots` or `disputed` is
        malformed."""
        shape = self.array().shape
        if not self.disputed:
            return np.zeros(shape, dtype=bool)
        flat = np.frombuffer(self.disputed, dtype=np.uint8).astype(bool)
        if flat.size != np.prod(shape):
            raise WireError("malformed slot contents: disputed slots are not those of the slots")
        return flat.reshape(shape)

    def array(self) -> Placement:
        """`[num_layers, slots_per_rank]` int16, a fresh writable copy. Raises WireError if `slots`
        does not divide into layers."""
        flat = np.frombuffer(self.slots, dtype="<i2").astype(np.int16)
        if self.num_layers <= 0 or flat.size % self.num_layers:
            raise WireError("malformed slot contents: slots do not divide into layers")
        return flat.reshape(self.num_layers, -1)

    @classmethod
    def of(
        cls,
        member: Member,
        slots: Placement,
        *,
        epoch: int = 0,
        number: int | None = None,
        disputed: NDArray[np.bool_] | None = None,
    ) -> SlotContents:
        """`slots` and `disputed` are `[num_layers, slots_per_rank]`."""
        return cls(
            rank=member.rank,
            incarnation=member.incarnation,
            num_layers=int(slots.shape[0]),
            slots=np.ascontiguousarray(slots, dtype="<i2").tobytes(),
            epoch=Epoch(epoch),
            number=number,
            disputed=b"" if disputed is None or not disputed.any() else disputed.tobytes(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """`by` doubts that an incarnation is alive. `raised_at` is the accuser's `Clock.now()` in
    seconds; `epoch` and `step` are the accuser's, or 0 if it has none."""

    rank: RankId
    incarnation: Incarnation
    by: str
    reason: SuspicionReason
    epoch: Epoch
    step: Step
    raised_at: float
    detail: str = ""

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderDoubt:
    """This rank does not hear the control plane of that name, which was the last to ping it."""

    rank: RankId
    incarnation: Incarnation
    control_plane: str

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessView:
    """What the kernel of a rank's host says of its process, told by the node agent while anybody
    suspects the rank, and whenever the process is stopped or continued.

    `host_gap_ms` is the longest time within the last second for which the node agent itself did not
    run: a paused or starved host looks like this from within.
    """

    rank: RankId
    incarnation: Incarnation
    state: ProcessState
    host_gap_ms: float = 0.0

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The control plane's judgement that an incarnation is dead, with the signals that led to it;
    or, with the cause DRAINED and no signals, that it leaves because somebody asked for it.

    The failure detector makes it with epoch 0. Membership sets `epoch` before the verdict is
    written to etcd. Times are the control plane's `Clock.now()`, in seconds.
    """

    rank: RankId
    incarnation: Incarnation
    cause: SuspicionReason
    signals: tuple[Suspicion, ...]
    epoch: Epoch  # of the map that leaves the rank out; 0 until membership has chosen it
    first_signal_at: float
    decided_at: float

    @property
    def member(self) -> Member:
        return Member(rank=self.rank, incarnation=self.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord:
    """The active control plane."""

    control_plane: str
    pid: int
    term: int  # grows with every election
    since: float  # Unix seconds
    host: str = ""  # on which `pid` is
    admin_url: str = ""  # of its admin API, without a path; empty: it has none
    release: Release = FIRST_RELEASE


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRecord:
    """The `starfish up` that runs the instance. `pid` and `started_ticks` name a process within
    `pid_namespace` on `host`."""

    run: str  # in the environment of all its processes as STARFISH_RUN
    host: str
    pid: int
    pid_namespace: str
    started_ticks: int
    url: str
    since: float  # Unix seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingRank:
    """A rank that shall run on an agent's node and has no process: one starts at `until`, in Unix
    seconds. `why` says how the last one ended, or why none could be started."""

    rank: RankId
    until: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRecord:
    """A node agent, and the ranks that its flags name: it starts and watches these, unless the
    desired state says where each rank runs. `ranks_max` is the number of ranks for which the node
    has room, 0 if nobody has said. `leaving`: it was told to end, and waits until its ranks have
    been drained. `metrics_port`: of its `/metrics` at `host`; 0: it serves none. `waiting` has the
    ranks whose next start is some time away."""

    node: NodeId
    pid: int
    ranks: tuple[RankId, ...]
    ranks_max: int = 0
    leaving: bool = False
    host: str = ""
    metrics_port: int = 0
    release: Release = FIRST_RELEASE
    waiting: tuple[WaitingRank, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRecord:
    """A gateway and its HTTP address, for `starfish status`. `own_port`: where it alone is reached,
    if other gateways share `port`; 0: nowhere."""

    gateway: str
    pid: int
    host: str
    port: int
    scheme: str = "http"
    own_port: int = 0
    release: Release = FIRST_RELEASE

    @property
    def own_url(self) -> str:
        """Without a path. Whoever asks there asks this gateway."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.own_port or self.port}"


def pack_map(expert_map: ExpertMap) -> bytes:
    return pack_plain(expert_map.to_wire())


def unpack_map(data: bytes) -> ExpertMap:
    """Raises WireError."""
    plain = unpack_plain(data)
    if not isinstance(plain, dict):
        raise WireError("malformed expert map: not a table")
    return ExpertMap.from_wire(plain)


def unpack_rank(data: bytes, reader: str) -> RankRecord:
    """For `reader`, which names a process that takes part in the instance. Raises WireError, and
    OtherRelease if that rank and this process cannot serve together."""
    record = unpack(data, RankRecord)
    if not record.release.speaks_with(own_release()):
        raise OtherRelease(refusal(reader, f"rank {record.member}", record.release))
    return record


pack_record = pack
unpack_record = unpack
