"""A request's tokens as its reader gets them: from a task that waits or, while it waits, passed on
as they come. Either way each comes once and in order."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from gateway.choice_reader import Delta, PromptTask
from gateway.detokenizer import TokenBytes
from gateway.generation import Generation
from gateway.session_driver import SessionDriver
from gateway.session_state import FailureKind, SessionFailed, SessionPolicy
from gateway.stream_session import StreamSession
from shared.types import Attempt, FinishReason, Incarnation, Member, RankId, SamplingParams
from shared.types import SessionId as Id
from shared.wire import SessionTokens

MEMBER = Member(rank=RankId(0), incarnation=Incarnation(1))
TOKEN_BYTES = TokenBytes({chr(97 + n): n for n in range(26)}, frozenset())


class ToyDriver:
    """Sessions that run on one rank, and get the tokens that a test gives them."""

    def __init__(self) -> None:
        self.sessions: list[StreamSession] = []
        self._wakers: list[Callable[[StreamSession], None]] = []

    def open(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        wake: Callable[[StreamSession], None],
        **_: Any,
    ) -> StreamSession:
        session = StreamSession(
            session=Id(f"g/{len(self.sessions)}"),
            prompt=prompt,
            sampling=sampling,
            policy=SessionPolicy(),
            now=0.0,
        )
        session.place(MEMBER, 0.0)
        self.sessions.append(session)
        self._wakers.append(wake)
        return session

    def stop(self, session: StreamSession) -> None:
        session.stop()

    def cancel(self, session: StreamSession) -> None:
        session.cancel()

    def give(self, *ids: int, choice: int = 0, finish: FinishReason | None = None) -> None:
        session = self.sessions[choice]
        message = SessionTokens(
            session=session.id,
            attempt=Attempt(0),
            index=len(session.emitted),
            ids=ids,
            finish=finish,
        )
        session.on_tokens(MEMBER, message, 1.0)
        self._wakers[choice](session)

    def fail(self, choice: int = 0) -> None:
        session = self.sessions[choice]
        session.shut_down()
        self._wakers[choice](session)


DEFAULT_SAMPLING = SamplingParams(max_tokens=100)


async def at_once(is_first: bool) -> None:
    pass


def generation(
    driver: ToyDriver,
    *,
    choices: int = 1,
    stops: tuple[str, ...] = (),
    turn: Callable[[bool], Awaitable[None]] = at_once,
    sampling: SamplingParams = DEFAULT_SAMPLING,
    prompt: tuple[int, ...] = (1, 2),
) -> Generation:
    task = PromptTask(prompt=prompt, sampling=sampling, stops=stops)
    return Generation(
        driver=cast("SessionDriver", driver),
        token_bytes=TOKEN_BYTES,
        tasks=[task] * choices,
        streaming=True,
        turn=turn,
    )


class Reader:
    """Reads to the end, as a stream's handler does."""

    def __init__(self, *, takes: Callable[[Delta], bool] = lambda _: True) -> None:
        self.ids: list[int] = []
        self.by_task: list[int] = []
        self.num_switches = 0
        self._takes = takes

    def pass_on(self, delta: Delta) -> bool:
        if not self._takes(delta):
            return False
        self.ids += delta.token_ids
        return True

    async def read(self, answer: Generation) -> None:
        while not answer.done:
            for delta in await answer.next_deltas(self.pass_on):
                self.ids += delta.token_ids
                self.by_task += delta.token_ids
            self.num_switches += 1


async def until_idle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_tokens_are_passed_on_without_a_switch_of_tasks() -> None:
    driver, reader = ToyDriver(), Reader()
    async with generation(driver) as answer:
        task = asyncio.create_task(reader.read(answer))
        await until_idle()
        for token in range(9):
            driver.give(token)
            assert reader.ids == list(range(token + 1)), "at once"
        assert reader.num_switches == 0
        driver.give(9, finish=FinishReason.LENGTH)
        await task
    assert reader.ids == list(range(10))
    assert reader.num_switches == 1


async def test_what_is_not_taken_comes_to_the_task_and_before_what_follows() -> None:
    refused = itertools.cycle([False, True, True])
    driver, reader = ToyDriver(), Reader(takes=lambda _: next(refused))
    async with generation(driver) as answer:
        task = asyncio.create_task(reader.read(answer))
        await until_idle()
        for token in range(8):
            driver.give(token)
            if token % 2:
                await until_idle()
        driver.give(8, finish=FinishReason.LENGTH)
        await task
    assert reader.ids == list(range(9))
    assert reader.by_task[:2] == [0, 1], "the second came before the task ran"


async def test_a_stop_string_ends_the_session_although_its_rank_goes_on() -> None:
    driver, reader = ToyDriver(), Reader()
    async with generation(driver, stops=("cd",)) as answer:
        task = asyncio.create_task(reader.read(answer))
        await until_idle()
        for token in (0, 1, 2, 3):
            driver.give(token)
        await task
        assert driver.sessions[0].ended
    assert reader.ids == [0, 1, 2, 3]


async def test_a_failure_comes_after_the_tokens_before_it() -> None:
    driver, reader = ToyDriver(), Reader(takes=lambda delta: delta.end < 2)
    async with generation(driver) as answer:
        task = asyncio.create_task(reader.read(answer))
        await until_idle()
        driver.give(0)
        driver.give(1)
        driver.fail()
        with pytest.raises(SessionFailed) as caught:
            await task
    assert reader.ids == [0, 1]
    assert caught.value.failure.kind is FailureKind.SHUTDOWN


async def test_choices_come_to_the_task_together() -> None:
    driver, reader = ToyDriver(), Reader()
    async with generation(driver, choices=2) as answer:
        task = asyncio.create_task(reader.read(answer))
        await until_idle()
        driver.give(0, choice=0)
        driver.give(0, choice=1)
        assert reader.ids == []
        await until_idle()
        assert reader.ids == [0, 0]
        assert reader.num_switches == 1
        for choice in (0, 1):
            driver.give(1, choice=choice, finish=FinishReason.LENGTH)
        await task


async def test_an_error_in_passing_on_is_its_own_request_s() -> None:
    def break_down(_: Delta) -> bool:
        raise ZeroDivisionError

    driver, reader = ToyDriver(), Reader(takes=break_down)
    async with generation(driver) as answer:
        task = asyncio.create_task(reader.read(answer))
        await until_idle()
        driver.give(0)  # the caller has others to serve
        with pytest.raises(ZeroDivisionError):
            await task
        driver.give(1)
    assert driver.sessions[0].ended


async def test_nothing_is_passed_on_once_nobody_waits() -> None:
    driver, reader = ToyDriver(), Reader()
    async with generation(driver) as answer:
        task = asyncio.create_task(reader.read(answer))
        await until_idle()
        driver.give(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        driver.give(1)
    assert reader.ids == [0]


async def test_many_choices_are_opened_a_few_in_a_turn_and_tokens_may_come_meanwhile() -> None:
    driver, turns = ToyDriver(), list[tuple[bool, int]]()

    async def turn(is_first: bool) -> None:
        turns.append((is_first, len(driver.sessions)))
        if not is_first:
            driver.give(0)

    async with generation(driver, choices=20, turn=turn) as answer:
        assert turns == [(True, 0), (False, 8), (False, 16)]
        (delta,) = await answer.next_deltas()
        assert (delta.choice, delta.token_ids) == (0, [0, 0])


@pytest.mark.parametrize(
    ("sampling", "prompt", "each_turn"),
    [
        (SamplingParams(logit_bias=tuple((n, 1.0) for n in range(1024))), (1, 2), 1),
        (SamplingParams(bad_words=((1, 2, 3),) * 64), (1, 2), 4),
        (SamplingParams(allowed_token_ids=tuple(range(4096))), (1, 2), 1),
        (DEFAULT_SAMPLING, (1,) * 300, 3),
    ],
)
async def test_choices_with_much_to_tell_a_rank_are_opened_fewer_in_a_turn(
    sampling: SamplingParams, prompt: tuple[int, ...], each_turn: int
) -> None:
    driver, opened = ToyDriver(), list[int]()

    async def turn(is_first: bool) -> None:
        opened.append(len(driver.sessions))

    async with generation(driver, choices=8, turn=turn, sampling=sampling, prompt=prompt):
        assert opened == list(range(0, 8, each_turn))
        assert len(driver.sessions) == 8


async def test_a_client_that_leaves_before_all_are_open_leaves_none() -> None:
    driver = ToyDriver()

    async def turn(is_first: bool) -> None:
        if not is_first:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        async with generation(driver, choices=20, turn=turn):
            pass
    assert [session.ended for session in driver.sessions] == [True] * 8


class CountedPrompt(tuple[int, ...]):
    """Counts how often all of it is looked at."""

    num_hashed = 0

    def __hash__(self) -> int:
        type(self).num_hashed += 1
        return super().__hash__()


async def test_what_was_cached_is_told_without_looking_at_the_prompts() -> None:
    """A stream tells it with every token, if its client wants that."""
    driver = ToyDriver()
    prompts = [CountedPrompt((1, 2, 3)), CountedPrompt((1, 2, 3)), CountedPrompt((4, 5))]
    sampling = SamplingParams(max_tokens=4)
    async with Generation(
        driver=cast("SessionDriver", driver),
        token_bytes=TOKEN_BYTES,
        tasks=[PromptTask(prompt=prompt, sampling=sampling) for prompt in prompts],
        streaming=True,
        turn=at_once,
    ) as generation:
        for session, num_cached in zip(driver.sessions, (2, 1, 2), strict=True):
            session.cached_tokens = num_cached
        num_hashed = CountedPrompt.num_hashed
        assert generation.num_cached == 1 + 2
        assert CountedPrompt.num_hashed == num_hashed
