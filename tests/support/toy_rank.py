"""A rank as a gateway sees it: the wire protocol over a real socket, with tokens that are a
function of the prompt and the index. For tests of the gateway alone."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence

from shared.handshake import Access, admit
from shared.records import RankRecord
from shared.types import (
    Epoch,
    FinishReason,
    Incarnation,
    Member,
    NodeId,
    RankId,
    RankState,
    SessionId,
    Step,
)
from shared.wire import (
    Cancel,
    Load,
    Ping,
    Pong,
    SessionTokens,
    Submit,
    TokenLogprob,
    Tokens,
    encode,
    read_message,
)

VOCAB = 420
EOS = 1


def toy_token(prompt: Sequence[int], index: int) -> int:
    """Never a special token, so that every token has a text."""
    return 2 + zlib.crc32(f"{list(prompt)}/{index}".encode()) % (VOCAB - 2)


def toy_tokens(prompt: Sequence[int], count: int) -> list[int]:
    return [toy_token(prompt, index) for index in range(count)]


def toy_logprob(token: int, num_top: int) -> TokenLogprob:
    """A function of the token. The likeliest tokens are the ids from 100 on."""
    top = tuple((100 + n, -0.1 / (n + 3)) for n in range(num_top))
    return TokenLogprob(logprob=-token / 7, rank=token, top=top)


class ToyRank:
    """`script`, if set, has token `i` of every session; `script_of`, if set, makes one of a
    session's prompt. `hold_at` stops every session before that
    index, until `go` is called. `refuse` is the number of Submits to refuse with a retryable
    error."""

    def __init__(self, rank: int, incarnation: int = 1, *, step_s: float = 0.001) -> None:
        self.access = Access("default")
        self.member = Member(rank=RankId(rank), incarnation=Incarnation(incarnation))
        self.step_s = step_s
        self.script: Sequence[int] | None = None
        self.script_of: Callable[[Sequence[int]], Sequence[int]] | None = None
        self.hold_at: int | None = None
        self.refuse = 0
        self.reject: str | None = None
        self.cached_tokens = 0  # reported for any prompt
        self.mute = False  # reads but never answers
        self.submits: list[Submit] = []
        self.cancels: list[Cancel] = []
        self.gateways: list[str] = []
        self.tenants: tuple[str, ...] = ()  # as the last Ping has told
        self.told_tenants = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.submitted = asyncio.Event()
        self._open: dict[SessionId, Submit] = {}
        self._next: dict[SessionId, int] = {}
        self._scripts: dict[SessionId, Sequence[int]] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._stepper: asyncio.Task[None] | None = None
        self._steps = 0
        self.port = 0

    async def start(self, port: int = 0) -> RankRecord:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._stepper = asyncio.create_task(self._step_for_ever())
        return self.record()

    def record(self) -> RankRecord:
        return RankRecord(
            rank=self.member.rank,
            incarnation=self.member.incarnation,
            node=NodeId("n"),
            pid=1,
            lease_id=0,
            state=RankState.READY,
            control_host="127.0.0.1",
            control_port=self.port,
            transfer_name="",
            slots=1,
            kv_blocks=256,
            kv_block_tokens=16,
            exchange="local",
        )

    def reset_connections(self) -> None:
        """Resets all connections, as a peer's RST does; the listener stays."""
        self._open.clear()
        for writer in list(self._writers):
            writer.transport.abort()

    async def kill(self) -> None:
        """Looks from outside like `kill -9`."""
        if self._server is not None:
            self._server.close()
        self.reset_connections()
        if self._stepper is not None:
            self._stepper.cancel()
            await asyncio.gather(self._stepper, return_exceptions=True)
        await asyncio.sleep(0)

    def go(self) -> None:
        self.hold_at = None

    def load(self) -> Load:
        tokens = sum(len(s.tokens) for s in self._open.values())
        return Load(
            running=len(self._open), waiting=0, tokens=tokens, kv_blocks_free=200, kv_blocks=256
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            caller, welcome = await admit(self.member, self.access, reader, writer)
            self.gateways.append(caller.name)
            if self.mute:
                await reader.read()
                return
            writer.write(encode(welcome))
            while (message := await read_message(reader)) is not None:
                self._answer(message, writer)
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, message: object, writer: asyncio.StreamWriter) -> None:
        match message:
            case Submit():
                self.submits.append(message)
                self.submitted.set()
                self._take(message)
            case Cancel():
                self.cancels.append(message)
                self.cancelled.set()
                self._open.pop(message.session, None)
            case Ping() if not self.mute:
                if message.tenants is not None:
                    self.tenants = message.tenants
                    self.told_tenants.set()
                pong = Pong(
                    nonce=message.nonce,
                    rank=self.member.rank,
                    incarnation=self.member.incarnation,
                    epoch=Epoch(1),
                    step=Step(0),
                    engine_age_ms=0.0,
                    waiting_for=(),
                    load=self.load(),
                )
                writer.write(encode(pong))

    def _take(self, submit: Submit) -> None:
        error = self.reject
        if self.refuse:
            self.refuse -= 1
            error = "the queue is full"
        if error is None:
            self._open[submit.session] = submit
            self._next[submit.session] = submit.num_emitted
            if self.script_of is not None:
                prompt = submit.tokens[: len(submit.tokens) - submit.num_emitted]
                self._scripts[submit.session] = self.script_of(prompt)
            self._score_prompt(submit)
            return
        answer = SessionTokens(
            session=submit.session,
            attempt=submit.attempt,
            index=submit.num_emitted,
            ids=(),
            error=error,
            retryable=self.reject is None,
        )
        self._send((answer,))

    def _score_prompt(self, submit: Submit) -> None:
        """Sends the scores in two messages, like two chunks. With max_tokens 0 nothing follows."""
        num_top, only = submit.sampling.prompt_logprobs, submit.sampling.max_tokens == 0
        if num_top is None and not only:
            return
        scores = () if num_top is None else [toy_logprob(t, num_top) for t in submit.tokens[1:]]
        half = len(scores) // 2
        for last, begin, part in ((False, 0, scores[:half]), (True, half, scores[half:])):
            reply = SessionTokens(
                session=submit.session,
                attempt=submit.attempt,
                index=submit.num_emitted,
                ids=(),
                finish=FinishReason.LENGTH if only and last else None,
                prompt_logprobs=tuple(part),
                prompt_index=begin + 1,
            )
            self._send((reply,))
        if only:
            del self._open[submit.session]

    async def _step_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            made = [m for s in list(self._open.values()) if (m := self._token_of(s)) is not None]
            if made and not self.mute:
                self._send(tuple(made))

    def _token_of(self, submit: Submit) -> SessionTokens | None:
        index = self._next[submit.session]
        if self.hold_at is not None and index >= self.hold_at:
            return None
        prompt = submit.tokens[: len(submit.tokens) - submit.num_emitted]
        script = self._scripts.get(submit.session, self.script)
        token = script[index] if script is not None else toy_token(prompt, index)
        self._next[submit.session] = index + 1
        finish = None
        stops = {*submit.sampling.stop_token_ids, *(() if submit.sampling.ignore_eos else (EOS,))}
        if token in stops and index >= submit.sampling.min_tokens:
            finish = FinishReason.STOP
        elif index + 1 == submit.sampling.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            del self._open[submit.session]
        return SessionTokens(
            session=submit.session,
            attempt=submit.attempt,
            index=index,
            ids=(token,),
            finish=finish,
            cached_tokens=self.cached_tokens if index == submit.num_emitted else 0,
            logprobs=()
            if submit.sampling.logprobs is None
            else (toy_logprob(token, submit.sampling.logprobs),),
        )

    def _send(self, sessions: tuple[SessionTokens, ...]) -> None:
        self._steps += 1
        frame = Tokens(
            rank=self.member.rank,
            incarnation=self.member.incarnation,
            epoch=Epoch(1),
            step=Step(self._steps),
            sessions=sessions,
            load=self.load(),
        )
        for writer in self._writers:
            writer.write(encode(frame))
