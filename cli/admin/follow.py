"""Asks for a change, and shows what it waits for until it is done."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console

from cli.admin.answers import Accepted, Status
from cli.admin.client import AdminClient, Malformed, Refused
from cli.admin.goals import Asked, Goal, Progress
from cli.run_dir import Target
from shared.clock import Clock
from shared.errors import Unavailable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_TIMEOUT = 4
_POLL_S = 0.25
_PATIENCE_S = 15.0
_SHOWN_MAX = 3
_COUNTS = re.compile(r"\d+ (sessions?|s)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """`name` and `fields` are the request's; `undo` is the command that takes it back, if there is
    one."""

    name: str
    fields: Mapping[str, Any]
    goal: Goal
    undo: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """`timeout_s` 0: as long as it takes."""

    waits: bool
    timeout_s: float
    as_json: bool


async def carry_out(target: Target, wish: Wish, manner: Manner, clock: Clock) -> int:
    """The exit code. Raises ConfigError, and Unavailable if nobody leads for a while."""
    client = AdminClient(target, clock)
    console = Console(stderr=True, highlight=False)
    accepted: Accepted | None = None
    try:
        processes = await client.processes() if manner.waits else {}
        accepted = await client.change(wish.name, wish.fields, patience_s=_PATIENCE_S)
        if not manner.waits:
            _tell(manner, accepted, None, Progress(result=accepted.message))
            return 0
        asked = Asked(accepted=accepted, processes=processes)
        return await _follow(client, wish, manner, asked, console, clock)
    except Refused as error:
        if manner.as_json:
            print(json.dumps({"refused": str(error)}))
        print(f"starfish: refused: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except Malformed as error:
        print(f"starfish: {error}", file=sys.stderr)
        return EXIT_USAGE
    except asyncio.CancelledError:
        what = "the change goes on without this command" if accepted else "it may be asked for"
        undo = f"; `{wish.undo}` takes it back" if wish.undo else ""
        console.print(f"{what}: see `starfish status`{undo}")
        raise
    finally:
        await client.close()


async def _follow(
    client: AdminClient,
    wish: Wish,
    manner: Manner,
    asked: Asked,
    console: Console,
    clock: Clock,
) -> int:
    accepted = asked.accepted
    deadline = clock.now() + manner.timeout_s if manner.timeout_s else float("inf")
    shown = _Shown(console)
    with shown:
        while True:
            status = await _read(client, accepted)
            progress = (
                Progress(waits_for=("a control plane that leads",))
                if status is None
                else wish.goal(status, asked)
            )
            if not progress.waits_for:
                break
            shown.show(progress.waits_for)
            if clock.now() >= deadline:
                waited = "; ".join(progress.waits_for[:_SHOWN_MAX])
                text = f"not done after {manner.timeout_s:g} s, and goes on: {waited}"
                _tell(manner, accepted, status, Progress(result=text, failed=True))
                return EXIT_TIMEOUT
            await asyncio.sleep(_POLL_S)
    _tell(manner, accepted, status, progress)
    return EXIT_FAILED if progress.failed else 0


async def _read(client: AdminClient, accepted: Accepted) -> Status | None:
    """None if nobody answers now, or who answers has not heard of the change yet."""
    try:
        status = await client.status()
    except Unavailable:
        return None
    return status if status.change.number >= accepted.change else None


def _tell(manner: Manner, accepted: Accepted, status: Status | None, end: Progress) -> None:
    if manner.as_json:
        print(
            json.dumps(
                {
                    "request_id": accepted.request_id,
                    "change": accepted.change,
                    "changed": accepted.changed,
                    "done": status is not None and not end.failed,
                    "result": end.result,
                    "status": msgspec.to_builtins(status),
                }
            )
        )
    else:
        print(end.result, file=sys.stderr if end.failed else sys.stdout)


class _Shown:
    """On a terminal one line that changes; elsewhere a line for each new thing to wait for."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = console.status("") if console.is_terminal else None
        self._told: set[str] = set()

    def __enter__(self) -> _Shown:
        if self._line is not None:
            self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.stop()

    def show(self, texts: tuple[str, ...]) -> None:
        if self._line is not None:
            more = f" (and {len(texts) - _SHOWN_MAX} more)" if len(texts) > _SHOWN_MAX else ""
            self._line.update("; ".join(texts[:_SHOWN_MAX]) + more)
            return
        for text in texts:
            form = _COUNTS.sub("", text)
            if form not in self._told:
                self._told.add(form)
                self._console.print(text)
