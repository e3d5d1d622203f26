"""Counts a request in and out: its client's rates before its body is read, its size before any work
is done for it, and its turn to have that work done. What fits, `admission` decides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager

from aiohttp import web

from gateway.admission import Admission, Ticket
from gateway.api.bodies import ChatBody, CompletionBody, GenerationBody
from gateway.api.request_context import RequestContext, require_context
from gateway.api.requests import CHOICES_MAX, COMPLETION_TOKENS_DEFAULT
from gateway.api.scheduling import TIMEOUT_HEADER, RequestScheduling, read_scheduling
from gateway.cache_salt import CacheSalts
from gateway.preparation import Preparation
from gateway.served_model import ModelLimits
from shared.clock import Clock
from shared.errors import RequestError

BYTES_PER_TOKEN = 4
"""Of a body, to estimate its tokens before it is tokenised."""


class RequestAdmission:
    """Call `enter` when a request comes, `reserve` when its body is decoded, `turn` around what its
    preparation computes, `grammar_turn` around the check of its grammar, `correct` when its tokens
    are known, `use` when it has ended."""

    def __init__(
        self,
        admission: Admission,
        preparation: Preparation,
        grammar_checks: Preparation,
        salts: CacheSalts,
        clock: Clock,
    ) -> None:
        self._admission = admission
        self._preparation = preparation
        self._grammar_checks = grammar_checks
        self._salts = salts
        self._clock = clock

    @contextmanager
    def enter(self, request: web.Request) -> Iterator[RequestContext]:
        """Raises Overloaded."""
        context, now = require_context(request), self._clock.now()
        context.account = self._admission.account_of(context.key, now)
        ticket = context.ticket = self._admission.enter(context.key, now)
        try:
            yield context
        finally:
            ticket.release(self._clock.now())

    def reserve(
        self, request: web.Request, body: GenerationBody, limits: ModelLimits
    ) -> RequestScheduling:
        """Raises Overloaded, and RequestError."""
        context = require_context(request)
        scheduling = read_scheduling(
            body,
            request.headers.get(TIMEOUT_HEADER),
            key=context.key,
            salts=self._salts,
            clock=self._clock,
            began_at=context.began_at,
        )
        choices = num_choices(body)
        tokens = estimated_tokens(body, choices, context.body_bytes, limits)
        _ticket_of(request).reserve(tokens=tokens, choices=choices, now=self._clock.now())
        return scheduling

    def turn(
        self, request: web.Request, *, expires_at: float = math.inf
    ) -> AbstractAsyncContextManager[None]:
        """Raises Overloaded, and SessionFailed if the request's time is over before its turn."""
        return self._turn_of(self._preparation, request, expires_at)

    def grammar_turn(
        self, request: web.Request, *, expires_at: float
    ) -> AbstractAsyncContextManager[None]:
        """As `turn`. A check may take seconds, for which no other's prompt waits."""
        return self._turn_of(self._grammar_checks, request, expires_at)

    def _turn_of(
        self, preparation: Preparation, request: web.Request, expires_at: float
    ) -> AbstractAsyncContextManager[None]:
        context = require_context(request)
        left_s = expires_at - self._clock.now()
        timeout_s = None if left_s == math.inf else max(0.0, left_s)
        return preparation.turn(context.key, cost=float(context.body_bytes), timeout_s=timeout_s)

    def correct(self, request: web.Request, *, tokens: int) -> None:
        """`tokens` are those of all choices, prompts and `max_tokens`. Raises Overloaded."""
        _ticket_of(request).correct(tokens=tokens, now=self._clock.now())

    def use(self, request: web.Request, *, tokens: int) -> None:
        """What it has had in the end, of all choices: the rest counts no more."""
        _ticket_of(request).tokens_used = tokens


def _ticket_of(request: web.Request) -> Ticket:
    ticket = require_context(request).ticket
    assert ticket is not None, "`enter` comes first"
    return ticket


def num_choices(body: GenerationBody) -> int:
    """What the request asks for, before its fields are checked one by one. Raises RequestError if
    it is too much."""
    prompt = body.prompt if isinstance(body, CompletionBody) else ""
    is_list = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    number = max(1, body.n or 1) * (len(prompt) if is_list else 1)
    if number > CHOICES_MAX:
        raise RequestError(f"at most {CHOICES_MAX} choices in all are supported", param="n")
    return number


def estimated_tokens(
    body: GenerationBody, choices: int, body_bytes: int, limits: ModelLimits
) -> int:
    """Of all choices: each of `n` has the prompt anew, and no choice is longer than the context."""
    wanted = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    context = limits.context_tokens_max
    prompt_tokens = -(-body_bytes // BYTES_PER_TOKEN) * max(1, body.n or 1) // choices
    max_tokens = COMPLETION_TOKENS_DEFAULT if isinstance(body, CompletionBody) else context
    if wanted is not None:
        max_tokens = min(max(0, wanted), context)
    return choices * min(context, prompt_tokens + max_tokens)
