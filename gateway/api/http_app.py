"""The HTTP side of the gateway: routes, reading bodies, answering whole or as an event stream.
What is generated, and where, is not decided here."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog
from aiohttp import web

from gateway.admission import Admission
from gateway.api.bodies import B, ChatBody, CompletionBody, GenerationBody, decode_body
from gateway.api.choices import ChoiceWriter
from gateway.api.errors import http_error, plain_http_error
from gateway.api.guided import asks_for_grammar, read_grammar
from gateway.api.requests import (
    CHOICES_MAX,
    RequestOptions,
    read_messages,
    read_options,
    read_prompts,
)
from gateway.api.responses import (
    DONE,
    ChunkWriter,
    Header,
    Usage,
    error_event,
    model_entry,
    model_list,
    response_body,
)
from gateway.detokenizer import TokenNames
from gateway.generation import Generation, PromptTask
from gateway.health import Health
from gateway.metrics import GatewayMetrics
from gateway.served_model import ModelLimits, ServedModel
from gateway.session_driver import SessionDriver
from gateway.stream_session import SessionFailed
from shared.clock import Clock
from shared.errors import RequestError, StarfishError, Unavailable

log = structlog.get_logger()

BODY_TIMEOUT_S = 60.0
WRITE_TIMEOUT_S = 60.0
"""A client that reads nothing for so long is as good as gone."""

_EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

RANK_HEADER = "x-starfish-rank"
"""Of a stream: the ranks that its choices began on, for who wants to know what a death hit."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A validated request. `tasks` are its choices, prompt by prompt."""

    header: Header
    options: RequestOptions
    tasks: list[PromptTask]
    names: TokenNames
    num_prompt_tokens: int

    def choices(self) -> list[ChoiceWriter]:
        chat = self.header.chat
        return [ChoiceWriter(self.options, task, self.names, chat=chat) for task in self.tasks]


class HttpApp:
    """`served` is set once the model is known."""

    def __init__(
        self,
        *,
        driver: SessionDriver,
        admission: Admission,
        clock: Clock,
        metrics: GatewayMetrics,
        health: Health,
        body_bytes_max: int,
    ) -> None:
        self._driver = driver
        self._admission = admission
        self._clock = clock
        self._metrics = metrics
        self._health = health
        self._body_bytes_max = body_bytes_max
        self.served: ServedModel | None = None

    def build(self) -> web.Application:
        app = web.Application(
            middlewares=[self._handle_errors], client_max_size=self._body_bytes_max
        )
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_get("/health", self._ready)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/metrics", self._metrics_page)
        return app

    @web.middleware
    async def _handle_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every failure becomes OpenAI's error shape, and every answer is counted."""
        try:
            response = await handler(request)
        except StarfishError as error:
            response = http_error(error).response()
        except web.HTTPRequestEntityTooLarge:
            response = http_error(self._too_large()).response()
        except web.HTTPException as error:
            response = plain_http_error(error.status, error.reason).response()
        except Exception:  # the outermost loop of a request
            log.exception("request_crashed", path=request.path)
            response = http_error(StarfishError("the gateway has a bug; see its log")).response()
        resource = request.match_info.route.resource
        endpoint = resource.canonical if resource is not None else "unknown"
        self._metrics.on_request(endpoint, response.status)
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        served = self._require_served_model()
        body = await self._read(request, ChatBody)
        limits = self._check(served, body)
        options = await _read_options(body, limits)
        prompt = await served.tokenizer.encode_chat(
            read_messages(body.messages),
            body.chat_template_kwargs,
            tokens_max=limits.context_tokens_max,
        )
        if not prompt:
            raise RequestError("the prompt has no tokens", param="messages")
        return await self._run(request, self._job(served, options, [prompt], limits, True))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        served = self._require_served_model()
        body = await self._read(request, CompletionBody)
        limits = self._check(served, body)
        options = await _read_options(body, limits)
        prompts = [
            await served.tokenizer.encode(prompt, tokens_max=limits.context_tokens_max)
            if isinstance(prompt, str)
            else prompt
            for prompt in read_prompts(body, limits.vocab_size)
        ]
        if not all(prompts):
            raise RequestError("the prompt has no tokens", param="prompt")
        return await self._run(request, self._job(served, options, prompts, limits, False))

    def _require_served_model(self) -> ServedModel:
        if self._health.draining:
            raise Unavailable("the gateway is shutting down")
        if self.served is None:
            raise Unavailable("the instance has no model yet: its control plane wrote no spec")
        return self.served

    async def _read(self, request: web.Request, cls: type[B]) -> B:
        if (request.content_length or 0) > self._body_bytes_max:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                raw = await request.read()
        except TimeoutError as error:
            raise RequestError("the body did not arrive in time", code="request_timeout") from error
        return decode_body(raw, cls)

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the body is larger than {self._body_bytes_max} bytes", code="request_too_large"
        )

    def _check(self, served: ServedModel, body: GenerationBody) -> ModelLimits:
        if body.model not in (None, "", served.name):
            raise _model_not_found(str(body.model), served.name)
        return served.limits(self._driver.view)

    def _job(
        self,
        served: ServedModel,
        options: RequestOptions,
        prompts: list[tuple[int, ...]],
        limits: ModelLimits,
        chat: bool,
    ) -> _Job:
        if len(prompts) * options.num_choices > CHOICES_MAX:
            raise RequestError(f"at most {CHOICES_MAX} choices in all are supported", param="n")
        header = Header(
            id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            created=int(self._clock.wall()),
            model=served.name,
            chat=chat,
        )
        tasks = [
            PromptTask(
                prompt=prompt,
                sampling=options.sampling_for(len(prompt), limits, choice),
                stops=options.stops,
                echo=options.echo,
                include_stop=options.include_stop,
            )
            for prompt in prompts
            for choice in range(options.num_choices)
        ]
        return _Job(
            header=header,
            options=options,
            tasks=tasks,
            names=served.tokenizer.names(with_special=options.include_special),
            num_prompt_tokens=sum(map(len, prompts)),
        )

    async def _run(self, request: web.Request, job: _Job) -> web.StreamResponse:
        generation = Generation(
            driver=self._driver,
            admission=self._admission,
            clock=self._clock,
            token_bytes=job.names.text,
            tasks=job.tasks,
            streaming=job.options.stream,
        )
        with generation:
            if job.options.stream:
                return await self._stream(request, generation, job)
            return await self._respond_whole(generation, job)

    async def _respond_whole(self, generation: Generation, job: _Job) -> web.Response:
        choices = job.choices()
        while not generation.done:
            for delta in await generation.next_deltas():
                choices[delta.choice].take(delta)
        body = response_body(
            job.header,
            [choice.choice() for choice in choices],
            _usage(generation, job),
            with_token_ids=job.options.return_token_ids,
        )
        return web.Response(body=body, content_type="application/json")

    async def _stream(
        self, request: web.Request, generation: Generation, job: _Job
    ) -> web.StreamResponse:
        """One write per batch of tokens. A failure before the first of them is a status still."""
        deltas = await generation.next_deltas()
        ranks = ",".join(str(rank) for rank in generation.ranks)
        response = web.StreamResponse(headers={**_EVENT_STREAM_HEADERS, RANK_HEADER: ranks})
        writer = ChunkWriter(
            job.header,
            with_token_ids=job.options.return_token_ids,
            include_usage=job.options.include_usage,
        )
        choices = job.choices()
        try:
            await response.prepare(request)
            data = b"".join(writer.role_chunk(index) for index in range(len(job.tasks)))
            while True:
                data += b"".join(choices[d.choice].chunk(d, writer) for d in deltas)
                if generation.done:
                    usage = _usage(generation, job)
                    data += (writer.usage_chunk(usage) if job.options.include_usage else b"") + DONE
                if data:
                    await _write(request, response, data)
                if generation.done:
                    break
                data = b""
                deltas = await generation.next_deltas()
        except SessionFailed as error:
            await response.write(error_event(http_error(error).body))
        except (ConnectionError, TimeoutError):
            log.info("client_gone", request=job.header.id)
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _models(self, request: web.Request) -> web.Response:
        served = self.served
        names = [served.name] if served else []
        created = served.created if served else 0
        return web.Response(body=model_list(names, created), content_type="application/json")

    async def _model(self, request: web.Request) -> web.Response:
        name, served = request.match_info["name"], self.served
        if served is None or name != served.name:
            raise _model_not_found(name, served.name if served else "none yet")
        return web.json_response(model_entry(served.name, served.created))

    async def _ready(self, request: web.Request) -> web.Response:
        reasons = self._health.reasons_not_ready(self.served is not None)
        status = 503 if reasons else 200
        plain = {"status": "not_ready" if reasons else "ready", "live": True, "reasons": reasons}
        return web.json_response(plain, status=status)

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def _metrics_page(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Raises TimeoutError for a client that reads nothing."""
    transport = request.transport
    if transport is not None and transport.get_write_buffer_size() == 0:
        await response.write(data)  # cannot wait long, and a timeout costs more than the write
        return
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await response.write(data)


async def _read_options(body: GenerationBody, limits: ModelLimits) -> RequestOptions:
    """A huge grammar takes its time, and other clients' tokens shall not wait for it."""
    options = read_options(body, limits)
    if not asks_for_grammar(body):
        return options
    grammar = await asyncio.to_thread(read_grammar, body)
    return replace(options, sampling=replace(options.sampling, grammar=grammar))


def _usage(generation: Generation, job: _Job) -> Usage:
    return Usage(
        prompt_tokens=job.num_prompt_tokens,
        cached_tokens=generation.num_cached,
        completion_tokens=generation.num_generated,
    )


def _model_not_found(name: str, served: str) -> RequestError:
    return RequestError(
        f"the model {name!r:.200} does not exist here; served: {served}",
        param="model",
        code="model_not_found",
    )
