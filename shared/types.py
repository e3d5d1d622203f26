"""Ids, enums and small value types, and the project's words. Each word has one meaning everywhere.

rank         a data-parallel rank, known by a stable number that survives its process
incarnation  a rank from one registration to its end by a verdict or by the end of its process; a
             process may go through several; numbered by a counter in etcd
member       a rank in one incarnation; the members of a map take part in its steps
expert       a logical expert of one MoE layer
slot         a physical place for one expert's weights, on one rank and in one layer
replica      one copy of an expert in a slot; an expert may have several
residents    the experts whose weights a rank's slots really hold
map          which expert each slot of each member holds, in all layers (`ExpertMap`)
epoch        the version of the map
step         one forward pass that all members of a map run together
session      one choice of a client request: it generates one sequence of tokens
attempt      one placement of a session on a rank
tenant       whom sessions are served for: the client that has an API key, known by the key's name
suspicion    somebody's doubt, written to etcd, that a member is alive
verdict      the control plane's decision that a member is dead, or has been drained and leaves
joiner       a member that is new in a map, or not yet known to have stepped under an earlier one
orphan       an expert that lost its last replica when a rank died
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Annotated, NamedTuple, NewType

from msgspec import Meta, Struct

RankId = NewType("RankId", int)
"""The number of a data-parallel rank, 0 … num_ranks-1. Stays the same when its process restarts."""

Incarnation = NewType("Incarnation", int)
"""A rank until a verdict or the end of its process: a fenced process may go on as the next one.
Later incarnations of a rank have higher numbers; a number may be skipped. It comes from a counter
in etcd, and starts at 1."""

ExpertId = NewType("ExpertId", int)
"""A logical expert of a layer, 0 … num_experts-1."""

SlotId = NewType("SlotId", int)
"""A physical place for one expert's weights, 0 … slots_per_rank-1 within one rank and layer."""

Epoch = NewType("Epoch", int)
"""Version of the expert map. It only grows. 0 means that no map has been published yet."""

Step = NewType("Step", int)
"""Index of a step. Within an epoch it starts at 0; ranks that meet by counting CUDA graph launches
count on across epochs."""

SessionId = NewType("SessionId", str)
"""Name of one choice of a client request. The gateway chooses it."""

Attempt = NewType("Attempt", int)
"""Number of a session's placement on a rank. The first is 0."""

NodeId = NewType("NodeId", str)
"""Name of a host, given by its node agent. Ranks of one host are expected to fail together."""

EMPTY_SLOT = -1
"""In a placement array: the slot exists and holds no expert."""

ABSENT_SLOT = -2
"""In a placement array: the rank has no such slot. Ranks may have different numbers of slots."""


REQUEST_ID_PATTERN = r"[A-Za-z0-9._:/+=@-]{1,128}"
"""What may stand in a header, a log line and a file name: nothing that ends one of them."""

RequestId = Annotated[str, Meta(pattern=rf"^({REQUEST_ID_PATTERN})?\Z")]
"""Names a client's request in logs. Chosen by the client, or by the gateway."""

TRACEPARENT_PATTERN = r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"

Traceparent = Annotated[str, Meta(pattern=rf"^({TRACEPARENT_PATTERN})?\Z")]
"""W3C's header of that name."""

TenantName = Annotated[str, Meta(max_length=64)]
"""The name of an API key; empty if there are none, for then there is one tenant."""


class RankState(Enum):
    """How far an incarnation has come, according to its own record."""

    STARTING = "starting"  # registered, but not yet with everything loaded that it was assigned
    READY = "ready"  # holds what it was assigned; takes part in steps once a map names it


class FinishReason(Enum):
    """Why a session ended. STOP and LENGTH have the values of OpenAI's `finish_reason`. CANCELLED
    is never sent to a client."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class RoutingPolicyName(Enum):
    """How a gateway chooses a session's rank: values of --routing (`gateway/routing_policy.py`)."""

    PREFIX_AFFINITY = "prefix-affinity"
    LEAST_TOKENS = "least-tokens"
    POWER_OF_TWO = "power-of-two"
    ROUND_ROBIN = "round-robin"


ROUTING_POLICIES = tuple(name.value for name in RoutingPolicyName)


class SuspicionReason(Enum):
    """Why somebody doubts that a rank is alive. A verdict names the reason of its first signal."""

    EXIT = "exit"  # the node agent saw that the process is exiting or gone
    STOPPED = "stopped"  # the node agent saw the process stopped by a signal
    LEASE = "lease"  # its record is gone from etcd: the lease expired or was revoked
    EXCHANGE = "exchange"  # a peer has waited for its data past the exchange deadline
    LINK = "link"  # a peer's transfer or control connection to it failed
    RESET = "reset"  # the gateway's or the control plane's connection to it broke
    SILENCE = "silence"  # it does not answer the gateway's or the control plane's probes
    OFFERED = "offered"  # of verdicts alone: maps given to ranks while etcd was away left it out
    DRAINED = "drained"  # of verdicts alone: it lives, and leaves because somebody asked for it
    OTHER = "other"  # one that a newer release knows

    @classmethod
    def _missing_(cls, value: object) -> SuspicionReason:
        return cls.OTHER  # or a verdict would not be seen


class Accuser(Enum):
    """The kind of process that raises a suspicion. It is a part of the key, so that etcd lets each
    write its own alone; `ACCUSERS` says which reasons it may have."""

    AGENT = "agent"
    RANK = "rank"
    GATEWAY = "gateway"
    CONTROL_PLANE = "control_plane"


ACCUSERS: Mapping[SuspicionReason, frozenset[Accuser]] = MappingProxyType(
    {
        SuspicionReason.EXIT: frozenset({Accuser.AGENT}),
        SuspicionReason.STOPPED: frozenset({Accuser.CONTROL_PLANE}),
        SuspicionReason.LEASE: frozenset({Accuser.CONTROL_PLANE}),
        SuspicionReason.EXCHANGE: frozenset({Accuser.RANK, Accuser.CONTROL_PLANE}),
        SuspicionReason.LINK: frozenset({Accuser.RANK, Accuser.CONTROL_PLANE}),
        SuspicionReason.RESET: frozenset({Accuser.GATEWAY, Accuser.CONTROL_PLANE}),
        SuspicionReason.SILENCE: frozenset({Accuser.GATEWAY, Accuser.CONTROL_PLANE}),
        SuspicionReason.OFFERED: frozenset(),
        SuspicionReason.DRAINED: frozenset(),
        SuspicionReason.OTHER: frozenset(),
    }
)
"""Who may raise a suspicion for which reason. The control plane repeats those of ranks, so that
node agents look at the process."""


class Member(Struct, frozen=True, kw_only=True, order=True):
    """A rank in one incarnation. Sorted by rank, then incarnation; printed as "3.7"."""

    rank: RankId
    incarnation: Incarnation

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}"


class Role(Enum):
    """What the process at the other end of a control connection is. It says which messages it may
    send."""

    GATEWAY = "gateway"
    RANK = "rank"
    CONTROL_PLANE = "control_plane"
    CLI = "cli"  # `starfish` and health checks: they ask, and change nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingBudget:
    """After `tokens` tokens of reasoning, `forced_ids` are generated, which end it. It begins with
    the answer if `opened`, else after `start_ids`. `end_ids` are its end if it comes by itself."""

    tokens: int
    opened: bool
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    forced_ids: tuple[int, ...]


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How to turn logits into tokens.

    Random numbers are keyed by `(seed, position)`, so that a continuation on another rank draws the
    same ones. `temperature == 0` is greedy. `top_k == 0` keeps all tokens.

    `logprobs` asks for the log-probability of each new token and of that many of the likeliest
    tokens; 0 asks for the new token's alone. `prompt_logprobs` asks the same for the prompt's
    tokens; with `max_tokens == 0` nothing else is computed. `presence_penalty` and
    `frequency_penalty` count the generated tokens, `repetition_penalty` the prompt's too. `grammar`
    is a grammar of llguidance that the generated text must follow; empty means none. `bad_words`
    are sequences of tokens that must not be generated. If `allowed_token_ids` is not empty, no
    other token is; it does not go with a grammar."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    thinking_budget: ThinkingBudget | None = None


PRIORITY_MAX = 2**31 - 1
WEIGHT_MIN, WEIGHT_MAX = 0.001, 1000.0


class SchedulingParams(Struct, frozen=True, kw_only=True):
    """For whom a session runs and how urgent it is. The same for all its attempts.

    `tenant` is "" if there are no API keys: then there is one tenant. `weight` is the tenant's part
    compared with those of others. A lower `priority` runs earlier, as vLLM has it. `deadline_at` is
    in seconds since 1970, 0 if there is none; hosts' clocks differ, so ranks only order sessions by
    it, and the gateway ends those that are late. Sessions share KV blocks only if they have the
    same `cache_salt`."""

    tenant: TenantName = ""
    weight: Annotated[float, Meta(ge=WEIGHT_MIN, le=WEIGHT_MAX)] = 1.0
    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = 0
    deadline_at: Annotated[float, Meta(ge=0.0)] = 0.0
    cache_salt: Annotated[bytes, Meta(max_length=32)] = b""


DEFAULT_SCHEDULING = SchedulingParams()


class DeviceKind(Enum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Operation(Enum):
    """What a rank announces before it begins it: it may keep the rank from answering."""

    LOAD = "load"  # experts into slots
    MAP = "map"  # a peer's memory into this process, and that of its predecessor out of it
    OTHER = "other"  # one that a newer release knows

    @classmethod
    def _missing_(cls, value: object) -> Operation:
        return cls.OTHER  # its duration is what counts


class ProcessState(Enum):
    """What the kernel says of a rank's process. STARVED: it would run, but gets no CPU."""

    RUNNING = "running"
    STARVED = "starved"
    SLEEPING = "sleeping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHandle:
    """How a process of the same host, user and PID namespace opens memory that another one made: as
    the descriptor `fd` of `pid`. `name` is random: on another host nothing has it."""

    pid: int
    fd: int
    name: str


class GivenRegion(NamedTuple):
    """Where a peer may write: `nbytes` at `address` in registered memory. `memory` is None if no
    other process can open it."""

    address: int
    nbytes: int
    memory: MemoryHandle | None = None
