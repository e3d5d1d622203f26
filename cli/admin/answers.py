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
    restart: tuple[int, ...] = ()


class Drain(msgspec.Struct, kw_only=True):
    after: str


class RankStatus(msgspec.Struct, kw_only=True):
    rank: int
    state: str
    node: str
    in_map: bool
    desired: bool
    safe_to_terminate: bool
    drain: Drain | None = None
    desired_node: str = ""
    process: int | None = None

    @property
    def after(self) -> str:
        """What becomes of it once it is drained; empty if it is not to be."""
        return "" if self.drain is None else self.drain.after


class Rebalance(msgspec.Struct, kw_only=True):
    asked: int
    done: int
    num_steps: int


class Status(msgspec.Struct, kw_only=True):
    ranks: tuple[RankStatus, ...]
    change: ChangeStatus
    verdicts_paused: bool
    rebalance: Rebalance | None = None


class Accepted(msgspec.Struct, kw_only=True):
    """`change` is the number of the newest change; `changed`: whether this request made it.
    `ranks`: how many ranks shall exist after it; None: an older control plane does not tell."""

    request_id: str
    change: int
    changed: bool
    message: str
    ranks: int | None = None
