"""One request in progress: its sessions (one per choice), read as text."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter
from types import TracebackType

from gateway.choice_reader import ChoiceReader, Delta, PromptTask
from gateway.detokenizer import TokenBytes
from gateway.piece_pace import AT_ONCE
from gateway.request_tag import NO_TAG, RequestTag
from gateway.session_driver import SessionDriver
from gateway.session_state import Failure, SessionFailed
from gateway.stream_session import StreamSession
from gateway.text_stream import TextStream
from shared.types import SessionId

PassOn = Callable[[Delta], bool]
"""Gets a delta as soon as its tokens have come, and returns whether that was all to do with it."""


_VALUES_PER_WEIGHT = 128


def _weight(task: PromptTask) -> int:
    """How many choices with little to tell a rank it takes as long to open: each value is packed
    here and unpacked there."""
    sampling = task.sampling
    num_values = len(task.prompt) + len(sampling.logit_bias) + len(sampling.allowed_token_ids)
    return 1 + (num_values + sum(map(len, sampling.bad_words))) // _VALUES_PER_WEIGHT


class Generation:
    """A context manager: opens the sessions on entry, a few in each `turn`, and cancels them on
    exit."""

    def __init__(
        self,
        *,
        driver: SessionDriver,
        token_bytes: TokenBytes,
        tasks: Sequence[PromptTask],
        streaming: bool,
        turn: Callable[[bool], Awaitable[None]],
        tag: RequestTag = NO_TAG,
    ) -> None:
        self._driver = driver
        self._token_bytes = token_bytes
        self._tasks = tasks
        self._turn = turn  # to open the next few; told whether they are the first
        self._tag = tag
        # An answer that is not streamed is read once, at its end, unless a stop string may end it.
        self._eager = streaming or any(task.stops for task in tasks)
        self._changed = asyncio.Event()
        self._readers: list[ChoiceReader] = []
        self._prompt_numbers: dict[tuple[int, ...], int] = {}
        self._prompt_of: list[int] = []  # the number of each choice's prompt: to compare takes long
        self._open: dict[SessionId, ChoiceReader] = {}  # those that are not done
        self._woken: dict[SessionId, ChoiceReader] = {}  # those of which there may be more to read
        self._failures: list[Failure] = []
        self._pass_on: PassOn | None = None  # while a reader waits that has given one
        self._left: list[Delta] = []  # what it did not deal with
        self._crash: Exception | None = None  # of it

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def num_generated(self) -> int:
        return sum(reader.num_read for reader in self._readers)

    @property
    def num_cached(self) -> int:
        """Prompt tokens that no choice had to compute; each distinct prompt counts once."""
        cached: dict[int, int] = {}
        for prompt, reader in zip(self._prompt_of, self._readers, strict=True):
            num_tokens = reader.session.cached_tokens
            cached[prompt] = min(cached.get(prompt, num_tokens), num_tokens)
        return sum(cached.values())

    def cached_tokens(self, choice: int) -> int:
        """Prompt tokens that this choice did not have to compute."""
        return self._readers[choice].session.cached_tokens

    @property
    def ranks(self) -> list[int]:
        """The ranks on which choices run now; a choice that waits for a rank has none."""
        members = [reader.session.member for reader in self._readers]
        return [member.rank for member in members if member is not None]

    async def __aenter__(self) -> Generation:
        try:
            left = 0
            for index, task in enumerate(self._tasks):
                if left <= 0:
                    await self._turn(index == 0)
                    left = AT_ONCE
                self._open_choice(index, task)
                left -= _weight(task)
        except BaseException:
            self._cancel()
            raise
        return self

    def _open_choice(self, index: int, task: PromptTask) -> None:
        session = self._driver.open(
            task.prompt,
            task.sampling,
            self._wake,
            scheduling=task.scheduling,
            expires_at=task.expires_at,
            stream_key=task.stream_key,
            home_rank=task.read.rank,
            tag=self._tag,
        )
        text = TextStream(
            self._token_bytes,
            follows=task.hidden_prompt,
            stops=task.stops,
            min_tokens=task.sampling.min_tokens,
            include_stop=task.include_stop,
        )
        reader = ChoiceReader(index, session, text, task)
        self._readers.append(reader)
        number = self._prompt_numbers.setdefault(task.prompt, len(self._prompt_numbers))
        self._prompt_of.append(number)
        self._open[session.id] = self._woken[session.id] = reader

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cancel()

    def _cancel(self) -> None:
        for reader in self._readers:
            self._driver.cancel(reader.session)

    async def next_deltas(self, pass_on: PassOn | None = None) -> list[Delta]:
        """Waits for at least one delta and returns all new ones. Raises SessionFailed, after every
        token from before the failure has been returned.

        Meanwhile `pass_on` gets the deltas of a request that has one choice, in the driver's call,
        which saves a task switch for every token. This returns with the first one that it leaves,
        and with the last."""
        while True:
            self._changed.clear()
            deltas = self._take_deltas()
            for delta in deltas:
                if delta.finish is not None:
                    self._end(self._readers[delta.choice])
            if deltas:
                return deltas
            if self._failures:
                raise SessionFailed(self._failures[0])
            if len(self._readers) == 1:
                self._pass_on = pass_on
            try:
                await self._changed.wait()
            finally:
                self._pass_on = None

    def _take_deltas(self) -> list[Delta]:
        if self._crash is not None:
            raise self._crash
        if self._left:
            left, self._left = self._left, []
            return left
        return self._read_woken()

    def _read_woken(self) -> list[Delta]:
        """Only these: a step may bring tokens of few choices among many."""
        woken, self._woken = self._woken, {}
        deltas: list[Delta] = []
        for reader in sorted(woken.values(), key=attrgetter("index")):
            was_behind = reader.is_behind
            if (delta := reader.take_delta()) is not None:
                deltas.append(delta)
                if was_behind:
                    self._woken[reader.session.id] = reader  # there may be more
            if reader.session.failure is not None:
                self._failures.append(reader.session.failure)
        return deltas

    def _wake(self, session: StreamSession) -> None:
        if self._pass_on is not None and not session.ended:
            if self._passes_on(self._pass_on):
                return
            self._pass_on = None
        if self._eager or session.ended:
            if (reader := self._open.get(session.id)) is not None:
                self._woken[session.id] = reader
            self._changed.set()

    def _passes_on(self, pass_on: PassOn) -> bool:
        """Whether the waiting reader need not be woken."""
        reader = self._readers[0]
        if reader.is_behind:
            return False  # of a resumed stream: there may be more than one delta
        try:
            delta = reader.take_delta()
            if delta is None or (delta.finish is None and pass_on(delta)):
                return True
        except Exception as error:  # noqa: BLE001 - it is this request's, and raised in its task
            self._crash = error
            return False
        self._left.append(delta)
        return False

    def _end(self, reader: ChoiceReader) -> None:
        del self._open[reader.session.id]
        self._woken.pop(reader.session.id, None)
        self._driver.stop(reader.session)
