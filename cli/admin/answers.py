"""What commands read of the admin API's answers. A field that is not known is ignored: the control
plane may be newer."""

from __future__ import annotations

import msgspec


class Step(msgspec.Struct, kw_only=True):
    """Something that is not done yet; `text` says what it waits for."""

    kind: str
    rank: int
    text: str


class ChangeStatus(msgspec.Struct, kw_only=True):
    number: int
    in_progress: bool
    steps: tuple[Step, ...]


class RankStatus(msgspec.Struct, kw_only=True):
    rank: int
    state: str
    node: str
    in_map: bool
    desired: bool
    safe_to_terminate: bool
    drain: dict[str, object] | None = None


class Status(msgspec.Struct, kw_only=True):
    ranks: tuple[RankStatus, ...]
    change: ChangeStatus
    verdicts_paused: bool


class Accepted(msgspec.Struct, kw_only=True):
    """`change` is the number of the newest change; `changed`: whether this request made it."""

    request_id: str
    change: int
    changed: bool
    message: str
