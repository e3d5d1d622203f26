"""One request in progress: its sessions (one per choice), read as text."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import msgspec

from gateway.detokenizer import TokenBytes
from gateway.prompt import SentText
from gateway.request_tag import NO_TAG, RequestTag
from gateway.session_driver import SessionDriver
from gateway.stream_session import SessionFailed, SessionState, StreamSession
from gateway.text_stream import TextStream
from shared.types import DEFAULT_SCHEDULING, FinishReason, SamplingParams, SchedulingParams
from shared.wire import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTask:
    """One choice to generate. `echo`: its text begins with the prompt's, which is `sent`, or if the
    prompt was sent as ids, what these decode to. `include_stop`: its text ends with the string or
    token that stopped it."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    sent: SentText | None = None
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    expires_at: float = math.inf
    stops: tuple[str, ...] = ()
    echo: bool = False
    include_stop: bool = False

    @property
    def hidden_prompt(self) -> tuple[int, ...]:
        """The tokens before the first one whose text is shown by decoding."""
        return () if self.echo and self.sent is None else self.prompt

    @property
    def tokens(self) -> int:
        """The most tokens that the choice may have, prompt included."""
        return len(self.prompt) + self.sampling.max_tokens


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new in a choice; a struct, because one is made for every token. `logprobs` has one
    entry per id if the request asks for them. A choice's first delta comes when all
    `prompt_logprobs` are known, and has them. With the finish reason STOP, `stop` is the stop
    string, or the id among `stop_token_ids`, that ended it; None for the model's own end."""

    choice: int
    text: str
    token_ids: list[int]
    finish: FinishReason | None
    logprobs: list[TokenLogprob]
    is_first: bool
    prompt_logprobs: list[TokenLogprob]
    stop: str | int | None = None


class _Reader:
    """Reads one session; `num_read` tokens of it so far."""

    def __init__(
        self, index: int, session: StreamSession, text: TextStream, task: PromptTask
    ) -> None:
        self.index = index
        self.session = session
        self.num_read = 0
        self._text = text
        self._task = task
        self._is_first = True

    def take_delta(self) -> Delta | None:
        session = self.session
        ids = session.emitted[self.num_read :]
        finished = session.state is SessionState.FINISHED
        if not (ids or finished):
            return None
        finish = session.finish if finished else None
        is_first, self._is_first = self._is_first, False
        echoed = self._echoed() if is_first else ""
        text, num_ids, stop = self._text.feed(ids, finish)
        begin = self.num_read
        self.num_read += num_ids
        return Delta(
            choice=self.index,
            text=echoed + text,
            token_ids=ids[:num_ids],
            finish=finish if stop is None else FinishReason.STOP,
            logprobs=session.logprobs[begin : self.num_read],
            is_first=is_first,
            prompt_logprobs=session.prompt_logprobs if is_first else [],
            stop=self._stop_token(ids) if finish is FinishReason.STOP and stop is None else stop,
        )

    def _stop_token(self, ids: Sequence[int]) -> int | None:
        last = ids[-1] if ids else None
        return last if last in self._task.sampling.stop_token_ids else None

    def _echoed(self) -> str:
        task = self._task
        if not task.echo:
            return ""
        return self._text.echo(task.prompt) if task.sent is None else task.sent.text


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
        self._readers: list[_Reader] = []
        self._open: list[_Reader] = []  # those that are not done

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
                tag=self._tag,
            )
            text = TextStream(
                self._token_bytes,
                follows=task.hidden_prompt,
                stops=task.stops,
                min_tokens=task.sampling.min_tokens,
                include_stop=task.include_stop,
            )
            self._readers.append(_Reader(index, session, text, task))
        self._open = list(self._readers)
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
            self._changed.set()

    async def next_deltas(self) -> list[Delta]:
        """Waits for at least one delta and returns all new ones. Raises SessionFailed, after every
        token from before the failure has been returned."""
        while True:
            self._changed.clear()
            deltas = [d for reader in self._open if (d := reader.take_delta()) is not None]
            for delta in deltas:
                if delta.finish is not None:
                    self._end(self._readers[delta.choice])
            if deltas:
                return deltas
            for reader in self._open:
                if reader.session.failure is not None:
                    raise SessionFailed(reader.session.failure)
            await self._changed.wait()

    def _end(self, reader: _Reader) -> None:
        self._driver.stop(reader.session)
        self._open.remove(reader)
