"""Routes of the Messages and the Responses API, which ask for a chat, and of SGLang's `/generate`,
which asks for a completion."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from aiohttp import web

from gateway.api.answer import AnswerJob
from gateway.api.anthropic.answer import MessagesAnswer
from gateway.api.anthropic.bodies import CountBody, MessagesBody
from gateway.api.anthropic.chat import chat_fields as chat_of_messages
from gateway.api.anthropic.chat import prompt_fields
from gateway.api.bodies import B, ChatBody, CompletionBody
from gateway.api.dialect import Dialect, naming_fields
from gateway.api.job import Job
from gateway.api.openai_responses.answer import ResponseAnswer
from gateway.api.openai_responses.bodies import ResponsesBody, refuse_unsupported
from gateway.api.openai_responses.chat import chat_fields as chat_of_response
from gateway.api.openai_responses.chat import input_messages
from gateway.api.openai_responses.references import with_named_items
from gateway.api.openai_responses.store import ResponseStore, StoredResponse
from gateway.api.request_context import require_context
from gateway.api.routes import Routes
from gateway.api.sglang.answer import GenerateAnswer
from gateway.api.sglang.bodies import GenerateBody, completion_of
from shared.errors import RequestError

MESSAGES_PATH = "/v1/messages"


MESSAGES_NAMES = {
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking",
    "response_format": "output_config",
}
RESPONSES_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}
GENERATE_NAMES = {
    "prompt": "text",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "ebnf",
}
"""OpenAI's field → what the API calls it."""


class AnswerChat(Protocol):
    """See `http_app.HttpApp.answer_chat`."""

    async def __call__(
        self,
        request: web.Request,
        cls: type[B],
        chat_of: Callable[[B], ChatBody],
        dialect_of: Callable[[Job], Dialect],
    ) -> web.StreamResponse: ...


class AnswerCompletion(Protocol):
    """See `http_app.HttpApp.answer_completion`."""

    async def __call__(
        self,
        request: web.Request,
        cls: type[B],
        completion_of: Callable[[B], CompletionBody],
        answer_of: Callable[[B], AnswerJob],
    ) -> web.StreamResponse: ...


class DialectRoutes:
    """`count_prompt` returns the number of tokens of a chat's prompt."""

    def __init__(
        self,
        *,
        answer_chat: AnswerChat,
        answer_completion: AnswerCompletion,
        count_prompt: Callable[
            [web.Request, type[CountBody], Callable[[CountBody], ChatBody]], Awaitable[int]
        ],
        store: ResponseStore,
    ) -> None:
        self._answer_chat = answer_chat
        self._answer_completion = answer_completion
        self._count_prompt = count_prompt
        self._store = store

    def add_to(self, routes: Routes) -> None:
        routes.post(
            MESSAGES_PATH,
            self._messages,
            "answers a chat, as Anthropic's API does",
            body=MessagesBody,
            streams=True,
        )
        routes.post(
            f"{MESSAGES_PATH}/count_tokens",
            self._count_tokens,
            "the number of a chat's prompt tokens",
            body=CountBody,
        )
        routes.post(
            "/v1/responses",
            self._responses,
            "answers a chat, as OpenAI's newer API does",
            body=ResponsesBody,
            streams=True,
        )
        routes.post(
            "/generate",
            self._generate,
            "goes on with texts, as SGLang's API does",
            body=GenerateBody,
            streams=True,
        )
        routes.get("/v1/responses/{id}", self._show_response, "a response that is remembered")
        routes.delete("/v1/responses/{id}", self._forget_response, "forgets a response")

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        def dialect_of(job: Job) -> Dialect:
            return MessagesAnswer(id=job.header.id, model=job.header.model, seed=job.named_seed)

        with naming_fields(MESSAGES_NAMES):
            return await self._answer_chat(
                request, MessagesBody, lambda body: _chat_body(chat_of_messages(body)), dialect_of
            )

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        with naming_fields(GENERATE_NAMES):
            return await self._answer_completion(
                request,
                GenerateBody,
                completion_of,
                lambda body: GenerateAnswer(is_batch=body.is_batch),
            )

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        count = await self._count_prompt(
            request, CountBody, lambda body: _chat_body(prompt_fields(body))
        )
        return web.json_response({"input_tokens": count})

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        answering = _Answering(self._store, require_context(request).key.name)
        with naming_fields(RESPONSES_NAMES):
            try:
                return await self._answer_chat(
                    request, ResponsesBody, answering.chat_of, answering.dialect_of
                )
            finally:  # a client may leave once it has read the last event
                answering.remember()

    async def _show_response(self, request: web.Request) -> web.Response:
        stored = self._require_stored(request)
        if request.query.get("stream", "false").lower() not in ("false", "0"):
            raise RequestError(
                "stream: a response that is remembered comes as a whole", param="stream"
            )
        return web.Response(body=stored.response, content_type="application/json")

    async def _forget_response(self, request: web.Request) -> web.Response:
        response_id = self._require_stored(request).id
        self._store.delete(response_id, require_context(request).key.name)
        return web.json_response({"id": response_id, "object": "response", "deleted": True})

    def _require_stored(self, request: web.Request) -> StoredResponse:
        """Raises RequestError."""
        response_id = request.match_info["id"]
        return _require(self._store, response_id, require_context(request).key.name, param=None)


class _Answering:
    """One request of the Responses API, with what comes before it and what is kept of it."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._body: ResponsesBody | None = None
        self._earlier: list[dict[str, Any]] = []
        self._answer: ResponseAnswer | None = None

    def chat_of(self, body: ResponsesBody) -> ChatBody:
        """Raises RequestError."""
        refuse_unsupported(body)
        given = with_named_items(body.input, self._store, self._owner)
        body = self._body = msgspec.structs.replace(body, input=given)
        if body.previous_response_id is not None:
            before = _require(
                self._store, body.previous_response_id, self._owner, param="previous_response_id"
            )
            self._earlier = before.messages
        return _chat_body(chat_of_response(body, self._earlier))

    def dialect_of(self, job: Job) -> Dialect:
        assert self._body is not None, "the chat is made first"
        header = job.header
        self._answer = ResponseAnswer(
            id=header.id,
            created=header.created,
            model=header.model,
            body=self._body,
            seed=job.named_seed,
        )
        return self._answer

    def remember(self) -> None:
        """Keeps the response unless the client asks not to, or it has failed."""
        body, answer = self._body, self._answer
        if body is None or answer is None or answer.done is None or body.store is False:
            return
        messages = [
            *self._earlier,
            *input_messages(body.input),
            *input_messages(answer.done["output"]),
        ]
        self._store.put(StoredResponse.of(answer.done, messages, owner=self._owner))


def _require(
    store: ResponseStore, response_id: str, owner: str, *, param: str | None
) -> StoredResponse:
    found = store.get(response_id, owner)
    if found is None:
        raise RequestError(
            f"the response {response_id!r:.80} is not remembered here: it is unknown, has made "
            "room for newer ones, or another gateway has it; pass the whole input",
            param=param,
            code="response_not_found",
        )
    return found


def _chat_body(fields: dict[str, Any]) -> ChatBody:
    """Raises RequestError."""
    try:
        return msgspec.convert(fields, ChatBody)
    except msgspec.ValidationError as error:
        raise RequestError(str(error)) from error
