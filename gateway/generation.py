"""One request in progress: its sessions (one per choice), read as text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from operator import attrgetter
from types import TracebackType

from gateway.choice_reader import ChoiceReader, Delta, PromptTask
from gateway.detokenizer import TokenBytes
from gateway.request_tag import NO_TAG, RequestTag
from gateway.session_driver import SessionDriver
from gateway.session_state import Failure, SessionFailed
from gateway.stream_session import StreamSession
from gateway.text_stream import TextStream
from shared.types import SessionId


class Generation:
    """A context manager: opens the sessions on entry, and cancels them on exit."""

    def __init__(
        self,
        *,
        driver: SessionDriver,
        token_bytes: TokenBytes,
        tasks: Sequence[PromptTask],
        streaming: bool,
        tag: RequestTag = NO_TAG,
    ) -> None:
        self._driver = driver
        self._token_bytes = token_bytes
        self._tasks = tasks
        self._tag = tag
        # An answer that is not streamed is read once, at its end, unless a stop string may end it.
        self._eager = streaming or any(task.stops for task in tasks)
        self._changed = asyncio.Event()
        self._readers: list[ChoiceReader] = []
        self._open: dict[SessionId, ChoiceReader] = {}  # those that are not done
        self._woken: dict[SessionId, ChoiceReader] = {}  # those of which there may be more to read
        self._failures: list[Failure] = []

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def num_generated(self) -> int:
        return sum(reader.num_read for reader in self._readers)

    @property
    def num_cached(self) -> int:
        """Prompt tokens that no choice had to compute; each distinct prompt counts once."""
        cached: dict[tuple[int, ...], int] = {}
        for session in (reader.session for reader in self._readers):
            known = cached.get(session.prompt, session.cached_tokens)
            cached[session.prompt] = min(known, session.cached_tokens)
        return sum(cached.values())

    def cached_tokens(self, choice: int) -> int:
        """Prompt tokens that this choice did not have to compute."""
        return self._readers[choice].session.cached_tokens

    @property
    def ranks(self) -> list[int]:
        """The ranks on which choices run now; a choice that waits for a rank has none."""
        members = [reader.session.member for reader in self._readers]
        return [member.rank for member in members if member is not None]

    def __enter__(self) -> Generation:
        for index, task in enumerate(self._tasks):
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
            self._readers.append(ChoiceReader(index, session, text, task))
        self._open = {reader.session.id: reader for reader in self._readers}
        self._woken = dict(self._open)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for reader in self._readers:
            self._driver.cancel(reader.session)

    def _wake(self, session: StreamSession) -> None:
        if self._eager or session.ended:
            if (reader := self._open.get(session.id)) is not None:
                self._woken[session.id] = reader
            self._changed.set()

    async def next_deltas(self) -> list[Delta]:
        """Waits for at least one delta and returns all new ones. Raises SessionFailed, after every
        token from before the failure has been returned."""
        while True:
            self._changed.clear()
            deltas = self._read_woken()
            for delta in deltas:
                if delta.finish is not None:
                    self._end(self._readers[delta.choice])
            if deltas:
                return deltas
            if self._failures:
                raise SessionFailed(self._failures[0])
            await self._changed.wait()

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

    def _end(self, reader: ChoiceReader) -> None:
        del self._open[reader.session.id]
        self._woken.pop(reader.session.id, None)
        self._driver.stop(reader.session)
