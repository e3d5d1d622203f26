"""What a request asks for of the scheduler, and how large it is taken to be before it is read."""

from __future__ import annotations

import math

import pytest

from gateway.api.bodies import ChatBody, CompletionBody, decode_body
from gateway.api.rate_headers import duration_text
from gateway.api.request_admission import estimated_tokens, num_choices
from gateway.api.scheduling import RequestScheduling, read_scheduling
from gateway.api_keys import ANYBODY, ApiKey
from gateway.cache_salt import CacheSalts
from gateway.served_model import ModelLimits
from shared.errors import RequestError
from tests.support.fake_clock import FakeClock

ALICE = ApiKey(name="alice", weight=2.0, priority=3, priority_min=-1)
LIMITS = ModelLimits(vocab_size=100, context_tokens_max=1000)
SALTS = CacheSalts(b"s" * 32, share=False)


def read(
    fields: bytes = b"", *, header: str | None = None, key: ApiKey = ALICE, waited_s: float = 0.0
) -> RequestScheduling:
    clock = FakeClock()
    began_at = clock.now()
    clock.advance(waited_s)
    body = decode_body(b'{"prompt": "x"' + fields + b"}", CompletionBody)
    return read_scheduling(body, header, key=key, salts=SALTS, clock=clock, began_at=began_at)


def test_a_key_gives_what_the_request_leaves_out() -> None:
    scheduling = read()
    assert scheduling.expires_at == math.inf
    params = scheduling.params
    assert (params.tenant, params.weight, params.priority) == ("alice", 2.0, 3)
    assert (params.deadline_at, params.cache_salt) == (0.0, SALTS.salt_of("alice"))


@pytest.mark.parametrize(("priority", "allowed"), [(-1, True), (0, True), (9, True), (-2, False)])
def test_a_priority_is_bounded_by_the_key(priority: int, allowed: bool) -> None:
    fields = b', "priority": %d' % priority
    assert read(fields, key=ANYBODY).params.priority == priority
    if allowed:
        assert read(fields).params.priority == priority
        return
    with pytest.raises(RequestError, match="-1 or more") as caught:
        read(fields)
    assert caught.value.param == "priority"


def test_a_timeout_counts_from_the_beginning_of_the_request() -> None:
    now = FakeClock().now()
    assert read(b', "timeout": 5').expires_at == now + 5
    assert read(header="5").expires_at == now + 5
    assert read(b', "timeout": 5', header="7", waited_s=2).expires_at == now + 5
    early, late = read(header="5"), read(header="5", waited_s=2)
    clock = FakeClock()
    assert early.params.deadline_at == pytest.approx(clock.wall() + 5)
    assert late.params.deadline_at == pytest.approx(clock.wall() + 5)


@pytest.mark.parametrize("header", ["", "x", "0", "-1", "nan", "inf", "86401"])
def test_a_timeout_that_is_none_is_refused(header: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(header=header)
    assert caught.value.param == "X-Request-Timeout"


@pytest.mark.parametrize("salt", [b'""', b'"' + b"x" * 257 + b'"'])
def test_a_salt_has_a_length(salt: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read(b', "cache_salt": ' + salt)
    assert caught.value.param == "cache_salt"


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ('"prompt": "x"', 1),
        ('"prompt": [1, 2, 3], "n": 4', 4),
        ('"prompt": ["x", "y"], "n": 4', 8),
        ('"prompt": [[1], [2], [3]]', 3),
        ('"prompt": "x", "n": -3', 1),
        ('"prompt": []', 1),
    ],
)
def test_choices_are_counted_before_fields_are_checked(fields: str, number: int) -> None:
    assert num_choices(decode_body(b"{" + fields.encode() + b"}", CompletionBody)) == number


def test_too_many_choices_are_refused_before_anything_is_tokenised() -> None:
    body = decode_body(b'{"prompt": ["x", "y", "z"], "n": 128}', CompletionBody)
    with pytest.raises(RequestError, match="256"):
        num_choices(body)


@pytest.mark.parametrize(
    ("fields", "body_bytes", "tokens"),
    [
        ('"prompt": "x", "max_tokens": 10', 400, 110),
        ('"prompt": "x"', 400, 116),
        ('"prompt": "x", "max_tokens": 10, "n": 3', 400, 330),
        ('"prompt": ["x", "y"], "max_tokens": 10', 400, 120),
        ('"prompt": ["x", "y"], "max_tokens": 10, "n": 2', 400, 240),
        ('"prompt": "x", "max_tokens": 10', 1 << 22, 1000),
        ('"prompt": "x", "max_tokens": 1000000', 40, 1000),
        ('"prompt": "x", "max_tokens": -5', 40, 10),
    ],
)
def test_a_request_is_as_large_as_its_body_and_its_max_tokens(
    fields: str, body_bytes: int, tokens: int
) -> None:
    body = decode_body(b"{" + fields.encode() + b"}", CompletionBody)
    assert estimated_tokens(body, num_choices(body), body_bytes, LIMITS) == tokens


def test_a_chat_without_a_limit_may_fill_the_context() -> None:
    raw = b'{"messages": [{"role": "user", "content": "x"}]%s}'
    body = decode_body(raw % b"", ChatBody)
    assert estimated_tokens(body, 1, 40, LIMITS) == 1000
    body = decode_body(raw % b', "max_completion_tokens": 5', ChatBody)
    assert estimated_tokens(body, 1, 40, LIMITS) == 15


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (360.25, "6m0.25s")],
)
def test_times_are_spelt_as_openai_does(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
