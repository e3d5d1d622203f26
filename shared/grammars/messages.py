"""What a process and its own grammar child say to each other over their socket pair. Private to the
two, so it is not part of the wire between services."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

from shared.grammars.closed_schema import JSON_SPACE

COMPILE_S_DEFAULT = 2.0
STEP_S_DEFAULT = 1.0
MEMORY_MB_DEFAULT = 1024
GRAMMAR_MEMORY_MB_MIN = 256


class GrammarKind(Enum):
    """The form in which a client states a grammar; LLGUIDANCE: as this project writes one."""

    JSON_SCHEMA = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"
    LLGUIDANCE = "llguidance"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarBudget:
    """What one grammar may cost: CPU seconds until its first mask, CPU seconds of one later mask,
    and memory of the whole child."""

    compile_s: float = COMPILE_S_DEFAULT
    step_s: float = STEP_S_DEFAULT
    memory_mb: int = MEMORY_MB_DEFAULT


class Check(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make a grammar of `text` and try it. Answered by Began, then Checked."""

    job: int
    kind: GrammarKind
    text: str
    json_space: str = JSON_SPACE


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make matcher `matcher`, after the tokens `emitted`. Answered by Began, then Mask or
    Refused."""

    job: int
    matcher: int
    grammar: str
    emitted: list[int]


class Advance(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """This token was drawn. Answered by Mask or Refused, in the order of these requests."""

    job: int
    matcher: int
    token: int


class Close(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    matcher: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message of a child: its tokenizer is loaded. `end_ids` end a text."""

    end_ids: list[int]


class Unusable(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Instead of Ready: the tokenizer cannot be used, nor will it be by another child."""

    error: str


class Began(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From now on the job counts against its budget."""

    job: int


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The job's matcher is not here: it was closed, or a child before had it."""

    job: int


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    job: int
    grammar: str


class Mask(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bit `t % 8` of byte `t // 8` says whether token `t` may come next. `cost_s`: CPU seconds that
    the mask took; 0 for a matcher's first."""

    job: int
    bits: bytes
    cost_s: float = 0.0


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`error` is a few words for the client."""

    job: int
    error: str


Request = Check | Open | Advance | Close
Reply = Ready | Unusable | Began | Gone | Checked | Mask | Refused

_encode = msgspec.msgpack.encode
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def frame(message: Request | Reply) -> bytes:
    body = _encode(message)
    return len(body).to_bytes(4, "little") + body


def read_request(body: bytes) -> Request:
    return _requests.decode(body)


def read_reply(body: bytes) -> Reply:
    return _replies.decode(body)
