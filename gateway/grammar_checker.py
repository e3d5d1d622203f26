"""Turns clients' grammars into those of ranks, and refuses what cannot be followed or costs too
much, before a rank sees it. Compiles in a child process, never on the event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from shared.errors import GrammarError, Overloaded, Unavailable
from shared.grammars.child import ChildEnd, TokenizerFile
from shared.grammars.closed_schema import JSON_SPACE
from shared.grammars.messages import Check, Checked, GrammarBudget, GrammarKind, Refused, Reply
from shared.grammars.supervisor import TOO_LARGE, TOO_LONG, UNAVAILABLE, GrammarSupervisor

log = structlog.get_logger()

CHECKS_MAX = 64
"""Grammars that may wait for the child at once."""
CACHE_BYTES_MAX = 16 << 20
DEATHS_MAX = 2
"""A grammar that was being compiled when so many children died is taken to be the reason."""

T = TypeVar("T")
_Key = tuple[GrammarKind, str, str]  # what Check asks


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    key: _Key
    answer: asyncio.Future[str]
    deaths: int = 0


class GrammarChecker:
    """On the event loop. The child begins with the first check."""

    def __init__(self, tokenizer: Path, budget: GrammarBudget) -> None:
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, _Job] = {}
        self._pending: dict[_Key, _Job] = {}
        self._cache = _AnswerCache(CACHE_BYTES_MAX)
        self._is_started = False
        self._is_unavailable = False
        self._supervisor = GrammarSupervisor(
            TokenizerFile(path=tokenizer),
            budget,
            on_reply=lambda reply: self._call(self._on_reply, reply),
            on_restart=lambda end: self._call(self._on_restart, end),
            on_unavailable=lambda detail: self._call(self._on_unavailable, detail),
        )

    @property
    def child_pid(self) -> int | None:
        return self._supervisor.pid

    async def check(self, kind: GrammarKind, text: str, *, json_space: str = JSON_SPACE) -> str:
        """The grammar that ranks follow. `json_space` as `grammar_of` has it. Raises GrammarError,
        with a few words for the client, Overloaded and Unavailable."""
        key = (kind, text, json_space)
        known = self._cache.get(key)
        if isinstance(known, GrammarError):
            raise GrammarError(str(known))
        if known is not None:
            return known
        job = self._pending.get(key) or self._begin(key)
        return await asyncio.shield(job.answer)  # others may wait for it, too

    def close(self) -> None:
        if self._is_started:
            self._supervisor.close()
        for job in list(self._jobs.values()):
            self._fail(job, Unavailable("the gateway is shutting down"))

    def _begin(self, key: _Key) -> _Job:
        if self._is_unavailable:
            raise Unavailable(UNAVAILABLE)
        if len(self._jobs) >= CHECKS_MAX:
            raise Overloaded("too many grammars wait to be checked; retry later", retry_after_s=1)
        if not self._is_started:
            try:
                self._supervisor.start()
            except OSError as error:
                raise Unavailable(f"no process for grammars: {error.strerror}") from error
            self._is_started = True
        job = _Job(next(self._numbers), key, self._loop.create_future())
        self._jobs[job.number] = self._pending[key] = job
        self._send(job)
        return job

    def _send(self, job: _Job) -> None:
        kind, text, json_space = job.key
        check = Check(job=job.number, kind=kind, text=text, json_space=json_space)
        self._supervisor.send(check)

    def _call(self, method: Callable[[T], None], argument: T) -> None:
        """From the child's threads to the event loop."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(method, argument)

    def _on_reply(self, reply: Reply) -> None:
        match reply:
            case Checked(job=number, grammar=grammar):
                if (job := self._jobs.get(number)) is not None:
                    self._end(job)
                    self._cache.put(job.key, grammar)
                    job.answer.set_result(grammar)
            case Refused(job=number, error=error):
                if (job := self._jobs.get(number)) is not None:
                    self._refuse(job, error)

    def _on_restart(self, end: ChildEnd) -> None:
        blamed = None if end.blamed is None else self._jobs.get(end.blamed)
        log.warning("grammar_child_ended", detail=end.detail, blamed=blamed is not None)
        if blamed is not None:
            blamed.deaths += 1
            if end.overran or blamed.deaths >= DEATHS_MAX:
                self._refuse(blamed, TOO_LONG if end.overran else TOO_LARGE)
        for job in self._jobs.values():
            self._send(job)

    def _on_unavailable(self, detail: str) -> None:
        log.error("no_guided_decoding", detail=detail)
        self._is_unavailable = True
        for job in list(self._jobs.values()):
            self._fail(job, Unavailable(UNAVAILABLE))

    def _refuse(self, job: _Job, words: str) -> None:
        self._cache.put(job.key, GrammarError(words))
        self._fail(job, GrammarError(words))

    def _fail(self, job: _Job, error: GrammarError | Unavailable) -> None:
        self._end(job)
        job.answer.set_exception(error)
        job.answer.exception()  # its client may be gone

    def _end(self, job: _Job) -> None:
        del self._jobs[job.number]
        del self._pending[job.key]


class _AnswerCache:
    """The latest answers, bounded in characters of what was asked and answered."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._size = 0
        self._answers: OrderedDict[_Key, str | GrammarError] = OrderedDict()

    def get(self, key: _Key) -> str | GrammarError | None:
        if key in self._answers:
            self._answers.move_to_end(key)
        return self._answers.get(key)

    def put(self, key: _Key, answer: str | GrammarError) -> None:
        self._answers[key] = answer
        self._size += _size(key, answer)
        while self._size > self._size_max:
            self._size -= _size(*self._answers.popitem(last=False))


def _size(key: _Key, answer: str | GrammarError) -> int:
    return len(key[1]) + len(key[2]) + len(str(answer))
