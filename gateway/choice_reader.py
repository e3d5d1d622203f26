"""One choice of a request in progress, read as text: what is new in it since it was read last, and
for a stream that is resumed, the same again without what its client has already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from gateway.prompt import SentText
from gateway.session_state import SessionState
from gateway.stream_position import ChoicePosition, PartlyRead
from gateway.stream_session import StreamSession
from gateway.text_stream import TextStream
from shared.types import DEFAULT_SCHEDULING, FinishReason, SamplingParams, SchedulingParams
from shared.wire import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTask:
    """One choice to generate. `echo`: its text begins with the prompt's, which is `sent`, or if the
    prompt was sent as ids, what these decode to. `include_stop`: its text ends with the string or
    token that stopped it. `stream_key` names it for ranks if another gateway may go on with it;
    `read` is what its client has had of it from another one."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    sent: SentText | None = None
    scheduling: SchedulingParams = DEFAULT_SCHEDULING
    expires_at: float = math.inf
    stops: tuple[str, ...] = ()
    echo: bool = False
    include_stop: bool = False
    stream_key: bytes = b""
    read: ChoicePosition = ChoicePosition()

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
    string, or the id among `stop_token_ids`, that ended it; None for the model's own end.

    `end` is the number of the choice's tokens up to and with these, `rank` the one that it runs on,
    -1 if none. `is_last`: its session has ended with these tokens. Of the events that tell of the
    delta the client has had `num_events_read`."""

    choice: int
    text: str
    token_ids: list[int]
    finish: FinishReason | None
    logprobs: list[TokenLogprob]
    is_first: bool
    prompt_logprobs: list[TokenLogprob]
    stop: str | int | None = None
    end: int = 0
    rank: int = -1
    is_last: bool = False
    num_events_read: int = 0


ALL_READ = 1 << 62
"""`num_events_read` of a delta that the client has had."""


class ChoiceReader:
    """Reads one session; `num_read` tokens of it so far. A choice that is resumed is first *behind*
    its client. It is read again up to the client's place, where a delta ends as it did before, and
    so does the next one if the client has had a part of it."""

    def __init__(
        self, index: int, session: StreamSession, text: TextStream, task: PromptTask
    ) -> None:
        self.index = index
        self.session = session
        self.num_read = 0
        self._text = text
        self._task = task
        self._is_first = True
        self.is_behind = task.read != ChoicePosition(rank=task.read.rank)

    def take_delta(self) -> Delta | None:
        session = self.session
        finish = session.finish if session.state is SessionState.FINISHED else None
        if self.is_behind:
            return self._take_again(finish)
        ids = session.emitted[self.num_read :]
        if not (ids or finish):
            return None
        return self._delta(ids, finish)

    def _take_again(self, finish: FinishReason | None) -> Delta | None:
        read = self._task.read
        if read.ended or self.num_read < read.num_tokens:
            return self._take_read(read, finish)
        if read.then is not None:
            return self._take_partly_read(read.then, finish)
        return self._catch_up()

    def _take_read(self, read: ChoicePosition, finish: FinishReason | None) -> Delta | None:
        """Some of what the client has. The text does not depend on how it is cut."""
        emitted = self.session.emitted
        ids = emitted[self.num_read : read.num_tokens]
        is_last = read.ended and finish is not None and len(emitted) <= read.num_tokens
        if ids or is_last:
            return self._delta(ids, finish if is_last else None, ALL_READ)
        if finish is not None or len(emitted) > read.num_tokens:
            return self._catch_up()  # no client can have read as much, or as little
        return None

    def _take_partly_read(self, then: PartlyRead, finish: FinishReason | None) -> Delta | None:
        emitted, end = self.session.emitted, self.num_read + then.num_tokens
        if finish is None and (len(emitted) < end or then.is_last):
            return None
        self.is_behind = False
        is_last = then.is_last and len(emitted) <= end
        ids = emitted[self.num_read : end]
        return self._delta(ids, finish if is_last else None, then.num_events)

    def _catch_up(self) -> Delta | None:
        self.is_behind = False
        return self.take_delta()

    def _delta(
        self, ids: list[int], finish: FinishReason | None, num_events_read: int = 0
    ) -> Delta:
        session = self.session
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
            end=self.num_read,
            rank=-1 if session.member is None else session.member.rank,
            is_last=finish is not None,
            num_events_read=num_events_read,
        )

    def _stop_token(self, ids: Sequence[int]) -> int | None:
        last = ids[-1] if ids else None
        return last if last in self._task.sampling.stop_token_ids else None

    def _echoed(self) -> str:
        task = self._task
        if not task.echo:
            return ""
        return self._text.echo(task.prompt) if task.sent is None else task.sent.text
