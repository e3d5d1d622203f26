"""Grammars that take all the time or memory there is: they end with their own session or a 400.
Whoever asked for something else is served meanwhile, and no engine and no event loop runs them."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway.grammar_checker import GrammarChecker
from gpu_worker.engine.grammar_matcher import GrammarMatcher
from gpu_worker.engine.grammar_service import GrammarService
from shared.errors import GrammarError, Unavailable
from shared.grammars.child import TokenizerFile
from shared.grammars.messages import GRAMMAR_MEMORY_MB_MIN, GrammarBudget, GrammarKind
from shared.grammars.sources import grammar_of
from shared.grammars.supervisor import TOO_LARGE, TOO_LONG
from tests.support.gateway_harness import GatewayHarness, running_gateway
from tests.support.tiny_tokenizer import write_tokenizer

MODEL = Path(__file__).parents[2] / "models" / "starling-14m"
TOKENIZER = TokenizerFile(path=MODEL / "tokenizer.json", vocab_size=4096, eos_token_ids=(2,))
PATIENCE_S = 60.0

ENDLESS_SCHEMA = '{"type": "integer", "multipleOf": 999983}'  # compiles for some 15 s
HUGE_REGEX = "(a{1000}){1000}"  # its first mask takes some 250 MB
SHORT = GrammarBudget(compile_s=0.2, step_s=0.1)
SMALL = GrammarBudget(compile_s=30.0, memory_mb=GRAMMAR_MEMORY_MB_MIN)


class Running:
    """A grammar service, and a wait for what it makes known."""

    def __init__(self, budget: GrammarBudget, tokenizer: TokenizerFile = TOKENIZER) -> None:
        self.service = GrammarService(tokenizer, budget)
        self._changed = threading.Event()
        self.service.renew(self._changed.set)
        self.service.start()

    def open(self, kind: GrammarKind, text: str, emitted: tuple[int, ...] = ()) -> GrammarMatcher:
        return self.service.open(grammar_of(kind, text), emitted)

    def wait_for(self, *matchers: GrammarMatcher) -> None:
        while any(m.allowed is None and m.error is None for m in matchers):
            assert self._changed.wait(PATIENCE_S)
            self._changed.clear()


@contextmanager
def running(budget: GrammarBudget, tokenizer: TokenizerFile = TOKENIZER) -> Iterator[Running]:
    found = Running(budget, tokenizer)
    try:
        yield found
    finally:
        found.service.shut_down()


def only_token(matcher: GrammarMatcher) -> int:
    """The lowest token that is allowed."""
    assert matcher.allowed is not None, matcher.error
    bits = int.from_bytes(matcher.allowed.tobytes(), "little")
    return (bits & -bits).bit_length() - 1


# On a rank ---------------------------------------------------------------------------------------


def test_an_endless_grammar_ends_alone_and_the_others_go_on_as_before() -> None:
    with running(SHORT) as grammars:
        innocent = grammars.open(GrammarKind.REGEX, "a{3}b{30}")
        grammars.wait_for(innocent)
        first = only_token(innocent)
        endless = grammars.open(GrammarKind.JSON_SCHEMA, ENDLESS_SCHEMA)
        assert endless.allowed is None, "opening returns at once"
        late = grammars.open(GrammarKind.REGEX, "b+")
        grammars.wait_for(endless, late)
        assert endless.error is not None
        assert TOO_LONG in endless.error
        assert only_token(innocent) == first, "a mask that was known stays known"
        innocent.accept_token(first)
        grammars.wait_for(innocent)
        assert innocent.error is None
        assert late.error is None


def test_a_huge_mask_ends_alone() -> None:
    with running(SMALL) as grammars:
        huge = grammars.open(GrammarKind.REGEX, HUGE_REGEX)
        innocent = grammars.open(GrammarKind.REGEX, "a+")
        grammars.wait_for(huge, innocent)
        assert huge.error is not None
        assert TOO_LARGE in huge.error
        assert innocent.error is None


def test_a_child_that_is_killed_costs_no_session_its_place() -> None:
    with running(GrammarBudget()) as grammars, running(GrammarBudget()) as undisturbed:
        regex = "[a-f]{1,9}(cat|dog)[0-9]{4}"
        matcher, other = (g.open(GrammarKind.REGEX, regex) for g in (grammars, undisturbed))
        for number in range(8):
            grammars.wait_for(matcher)
            undisturbed.wait_for(other)
            assert matcher.allowed is not None, matcher.error
            assert other.allowed is not None
            assert matcher.allowed.tobytes() == other.allowed.tobytes()
            token = only_token(matcher)
            pid = grammars.service.child_pid
            if number % 3 == 1 and pid is not None:
                os.kill(pid, signal.SIGKILL)
            matcher.accept_token(token)
            other.accept_token(token)
            if number % 3 == 2 and (pid := grammars.service.child_pid) is not None:
                os.kill(pid, signal.SIGKILL)


def test_a_child_that_is_stopped_holds_up_nobody_who_asks_it() -> None:
    with running(GrammarBudget()) as grammars:
        pid = grammars.service.child_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        grammar = grammar_of(GrammarKind.REGEX, "x" * 100_000)
        matchers = [grammars.service.open(grammar, ()) for _ in range(100)]  # 10 MB
        os.kill(pid, signal.SIGCONT)
        grammars.wait_for(*matchers)
        assert all(matcher.error is None for matcher in matchers)
        assert grammars.service.child_pid == pid


def test_without_a_usable_tokenizer_there_is_an_error_and_no_endless_restart(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with running(GrammarBudget(), TokenizerFile(path=tmp_path / "tokenizer.json")) as grammars:
        matcher = grammars.open(GrammarKind.REGEX, "a")
        grammars.wait_for(matcher)
        assert matcher.error is not None
        with pytest.raises(GrammarError):
            grammars.open(GrammarKind.REGEX, "a")


def test_choices_of_one_request_are_compiled_once_and_step_apart() -> None:
    with running(GrammarBudget()) as grammars:
        choices = [grammars.open(GrammarKind.REGEX, "[a-z]{2}[0-9]{2}") for _ in range(4)]
        grammars.wait_for(*choices)
        first = choices[0].allowed
        assert first is not None
        choices[1].accept_token(only_token(choices[1]))
        grammars.wait_for(*choices)
        assert choices[0].allowed is first
        assert choices[2].allowed is not None
        assert choices[2].allowed.tobytes() == first.tobytes()


# On a gateway ------------------------------------------------------------------------------------


async def test_one_check_that_is_endless_is_refused_once_and_others_are_answered() -> None:
    checker = GrammarChecker(TOKENIZER.path, SHORT)
    try:
        endless = asyncio.ensure_future(checker.check(GrammarKind.JSON_SCHEMA, ENDLESS_SCHEMA))
        same = asyncio.ensure_future(checker.check(GrammarKind.JSON_SCHEMA, ENDLESS_SCHEMA))
        assert "a+" in await checker.check(GrammarKind.REGEX, "a+")
        for refused in (endless, same):
            with pytest.raises(GrammarError, match=TOO_LONG):
                await refused
        pid = checker.child_pid
        with pytest.raises(GrammarError, match=TOO_LONG):
            await checker.check(GrammarKind.JSON_SCHEMA, ENDLESS_SCHEMA)
        assert checker.child_pid == pid, "the answer was known"
    finally:
        checker.close()


async def test_a_check_that_takes_all_memory_is_refused() -> None:
    checker = GrammarChecker(TOKENIZER.path, SMALL)
    try:
        with pytest.raises(GrammarError, match=TOO_LARGE):
            await checker.check(GrammarKind.REGEX, HUGE_REGEX)
        await checker.check(GrammarKind.REGEX, "a+")
    finally:
        checker.close()


async def test_a_check_survives_the_death_of_its_child() -> None:
    checker = GrammarChecker(TOKENIZER.path, GrammarBudget())
    try:
        await checker.check(GrammarKind.REGEX, "a+")
        pid = checker.child_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await checker.check(GrammarKind.REGEX, "b+")
    finally:
        checker.close()


async def test_checks_that_wait_when_it_closes_are_told() -> None:
    checker = GrammarChecker(TOKENIZER.path, GrammarBudget())
    waiting = asyncio.ensure_future(checker.check(GrammarKind.REGEX, "a+"))
    await asyncio.sleep(0)
    checker.close()
    with pytest.raises(Unavailable):
        await waiting


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GatewayHarness]:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    async with running_gateway(folder, num_ranks=1, grammar_compile_s=0.2) as harness:
        yield harness


async def post(
    gateway: GatewayHarness, body: Any, path: str = "/v1/completions", **headers: str
) -> tuple[int, dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    async with gateway.http.post(
        gateway.url + path, data=io.BytesIO(raw), headers=headers
    ) as response:
        return response.status, await response.json()


PLAIN = {"prompt": "x", "max_tokens": 3}
PROPERTIES = {f"p{i}": {"type": "string"} for i in range(4000)}
HOSTILE = [
    {"guided_json": {"type": "object", "properties": PROPERTIES}, "n": 4},
    {"guided_json": json.loads(ENDLESS_SCHEMA)},
    {"guided_json": {"$ref": "#"}},
    {"guided_regex": HUGE_REGEX},
    {"guided_regex": "(" * 60_000 + "a" + ")" * 60_000},
    {"guided_grammar": "root ::= " + '"a" ' * 600_000},
    {"guided_grammar": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000},
    {"guided_grammar": 'start: (("a"{1000}){1000}){1000}'},
    {"guided_grammar": "start: a\na: a"},
    {"structured_outputs": {"choice": ["a" * 200_000]}},
]


@pytest.mark.asyncio(loop_scope="module")
async def test_another_client_is_served_while_hostile_grammars_are_checked(
    gateway: GatewayHarness,
) -> None:
    hostile = [asyncio.ensure_future(post(gateway, {**PLAIN, **each})) for each in HOSTILE]
    for _ in range(5):
        status, _ = await post(gateway, PLAIN)
        assert status == 200
    assert not all(each.done() for each in hostile), "nobody waited for them"
    for status, answer in await asyncio.gather(*hostile):
        assert status == 400
        assert len(answer["error"]["message"]) < 400
        assert answer["error"]["param"]
    status, _ = await post(gateway, {**PLAIN, "guided_regex": "[a-z]+"})
    assert status == 200


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        (json.dumps(PLAIN).encode(), "gzip", 400),
        (json.dumps(PLAIN).encode(), "br", 415),
        (gzip.compress(json.dumps(PLAIN).encode(), mtime=0), "gzip", 200),
        (gzip.compress(b" " * (256 << 20), mtime=0), "gzip", 413),
    ],
)
async def test_coded_bodies(gateway: GatewayHarness, body: bytes, coding: str, status: int) -> None:
    found, answer = await post(gateway, body, **{"Content-Encoding": coding})
    assert found == status
    assert status == 200 or answer["error"]["type"] == "invalid_request_error"


@pytest.mark.asyncio(loop_scope="module")
async def test_log_probabilities_of_many_prompts_and_choices_are_refused(
    gateway: GatewayHarness,
) -> None:
    body = {"prompt": [[5] * 2000] * 64, "n": 4, "prompt_logprobs": 20, "max_tokens": 1}
    status, answer = await post(gateway, body)
    assert (status, answer["error"]["param"]) == (400, "prompt_logprobs")


@pytest.mark.asyncio(loop_scope="module")
async def test_choices_of_a_prompt_share_its_log_probabilities(gateway: GatewayHarness) -> None:
    body = {"prompt": ["ab", "cd"], "n": 3, "prompt_logprobs": 2, "max_tokens": 1}
    status, answer = await post(gateway, body)
    assert status == 200
    shown = [choice["prompt_logprobs"] for choice in answer["choices"]]
    assert shown[0] == shown[1] == shown[2] != shown[3] == shown[4] == shown[5]
    assert shown[0][0] is None
    submits = [s for rank in gateway.ranks for s in rank.submits]
    scored = [s for s in submits if s.sampling.prompt_logprobs is not None]
    assert len(scored) == 2, "each prompt was scored once"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("num_messages", "param", "code"),
    [(2_000, "messages", None), (100_000, None, "too_many_values")],
)
async def test_a_chat_of_many_empty_messages_is_refused(
    gateway: GatewayHarness, num_messages: int, param: str | None, code: str | None
) -> None:
    messages = [{"role": "user", "content": ""}] * num_messages
    status, answer = await post(gateway, {"messages": messages}, path="/v1/chat/completions")
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, param, code)
