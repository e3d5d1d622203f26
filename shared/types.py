"""Ids, enums and small value types of the domain. One word, one spelling, everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

RankId = NewType("RankId", int)
"""A stable number of a data-parallel rank, 0 … num_ranks-1. Survives restarts of the process."""

Incarnation = NewType("Incarnation", int)
"""One life of a rank's process. Grows by one at each start; comes from a counter in etcd."""

ExpertId = NewType("ExpertId", int)
"""A logical expert of a layer, 0 … num_experts-1."""

SlotId = NewType("SlotId", int)
"""A physical place for one expert's weights, local to a rank and layer."""

Epoch = NewType("Epoch", int)
"""Version of the expert map. Only grows; 0 means that no map was published yet."""

Step = NewType("Step", int)
"""Index of a lockstep forward within an epoch, from 0."""

SessionId = NewType("SessionId", str)
"""One client request, named by the gateway."""

Attempt = NewType("Attempt", int)
"""One placement of a session on a rank, from 0."""

NodeId = NewType("NodeId", str)
"""A host, as the node agent names it; the unit of correlated failure."""

EMPTY_SLOT = -1
"""In a placement array: the slot exists and holds no expert."""

ABSENT_SLOT = -2
"""In a placement array: the rank has no such slot (ranks may own different numbers)."""


class RankState(Enum):
    """Where a rank's incarnation stands, as its own record tells it."""

    STARTING = "starting"  # registered; loads the model, opens links to its peers
    READY = "ready"  # can load assigned experts and take part in steps once a map names it


class FinishReason(Enum):
    """Why a session's tokens end; the values are OpenAI's `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class SuspicionReason(Enum):
    """What made somebody doubt that a rank lives. Never a verdict by itself."""

    EXIT = "exit"  # the node agent's pidfd fired
    STOPPED = "stopped"  # the node agent saw the process stopped by a signal
    LEASE = "lease"  # its lease expired or was revoked
    EXCHANGE = "exchange"  # a peer waits for its data past the exchange deadline
    LINK = "link"  # a peer's transfer or control connection to it failed
    RESET = "reset"  # the gateway's connection to it broke
    SILENCE = "silence"  # it does not answer the control plane's probes


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Member:
    """A rank in one of its lives."""

    rank: RankId
    incarnation: Incarnation

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to turn logits into tokens. Keyed by `(seed, position)`: a continuation on another
    rank draws the same numbers. `temperature == 0` is greedy. `top_k == 0` keeps all.

    `logprobs` asks for the log-probability of each new token and of so many of the likeliest (0:
    the token's alone); `prompt_logprobs` for those of the prompt's tokens, which with `max_tokens
    == 0` are all that is computed. Penalties count what the session generated;
    `repetition_penalty` its prompt, too. `grammar` is one of llguidance's (empty: none), which the
    generated text follows."""

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


class DeviceKind(Enum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ProcessState(Enum):
    """What the kernel says of a rank's process. STARVED: it would run, but gets no CPU."""

    RUNNING = "running"
    STARVED = "starved"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
