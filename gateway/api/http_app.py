"""The gateway's HTTP routes: reads and validates requests, and starts their generation. How an
answer is written is `answer`'s."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from gateway.admission import Admission
from gateway.api.answer import answer_stream, answer_whole
from gateway.api.bodies import B, ChatBody, CompletionBody, GenerationBody, decode_body
from gateway.api.errors import http_error, plain_http_error
from gateway.api.guided import asks_for_grammar, read_grammar
from gateway.api.job import Job
from gateway.api.requests import (
    CHOICES_MAX,
    RequestOptions,
    read_messages,
    read_options,
    read_prompts,
)
from gateway.api.responses import Header, model_entry, model_list
from gateway.generation import Generation, PromptTask
from gateway.health import Health
from gateway.metrics import GatewayMetrics
from gateway.model_loader import ModelLoader
from gateway.served_model import ModelLimits, ServedModel
from gateway.session_driver import SessionDriver
from shared.clock import Clock
from shared.errors import RequestError, StarfishError, Unavailable

log = structlog.get_logger()

BODY_TIMEOUT_S = 60.0
MODEL_WAIT_S = 5.0
"""How long a request waits for a model that is not loaded yet."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpApp:
    def __init__(
        self,
        *,
        driver: SessionDriver,
        admission: Admission,
        clock: Clock,
        metrics: GatewayMetrics,
        health: Health,
        models: ModelLoader,
        body_bytes_max: int,
    ) -> None:
        self._driver = driver
        self._admission = admission
        self._clock = clock
        self._metrics = metrics
        self._health = health
        self._models = models
        self._body_bytes_max = body_bytes_max

    def build(self, *outer: Middleware) -> web.Application:
        """`outer` are middlewares around its own ones, the outermost first."""
        app = web.Application(
            middlewares=[*outer, self._handle_errors], client_max_size=self._body_bytes_max
        )
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/models/{name:.+}", self._show_model)
        app.router.add_get("/health", self._show_ready)
        app.router.add_get("/health/ready", self._show_ready)
        app.router.add_get("/health/live", self._show_live)
        app.router.add_get("/metrics", self._metrics_page)
        return app

    @web.middleware
    async def _handle_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns every failure into OpenAI's error shape, and counts every answer."""
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
            response = http_error(
                StarfishError("the gateway failed; its log has the details")
            ).response()
        resource = request.match_info.route.resource
        endpoint = resource.canonical if resource is not None else "unknown"
        self._metrics.on_request(endpoint, response.status)
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        served = await self._require_served_model()
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
        served = await self._require_served_model()
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

    async def _require_served_model(self) -> ServedModel:
        """Raises Unavailable with what is being waited for. A gateway that has just started needs
        a moment to read etcd and the tokenizer, which its clients need not notice."""
        if self._health.draining:
            raise Unavailable("the gateway is shutting down")
        served = await self._models.wait(MODEL_WAIT_S)
        if served is None:
            raise Unavailable("not ready: " + "; ".join(self._health.reasons_not_ready()))
        return served

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
    ) -> Job:
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
        return Job(
            header=header,
            options=options,
            tasks=tasks,
            names=served.tokenizer.names(with_special=options.include_special),
            num_prompt_tokens=sum(map(len, prompts)),
        )

    async def _run(self, request: web.Request, job: Job) -> web.StreamResponse:
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
                return await answer_stream(request, generation, job)
            return await answer_whole(generation, job)

    async def _list_models(self, request: web.Request) -> web.Response:
        served = await self._require_served_model()
        body = model_list([served.name], served.created)
        return web.Response(body=body, content_type="application/json")

    async def _show_model(self, request: web.Request) -> web.Response:
        name, served = request.match_info["name"], await self._require_served_model()
        if name != served.name:
            raise _model_not_found(name, served.name)
        return web.json_response(model_entry(served.name, served.created))

    async def _show_ready(self, request: web.Request) -> web.Response:
        reasons = self._health.reasons_not_ready()
        status = 503 if reasons else 200
        plain = {"status": "not_ready" if reasons else "ready", "live": True, "reasons": reasons}
        return web.json_response(plain, status=status)

    async def _show_live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    async def _metrics_page(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


async def _read_options(body: GenerationBody, limits: ModelLimits) -> RequestOptions:
    """Reads a grammar on a thread: a huge one takes long, and no other client may wait for it."""
    options = read_options(body, limits)
    if not asks_for_grammar(body):
        return options
    grammar = await asyncio.to_thread(read_grammar, body)
    return replace(options, sampling=replace(options.sampling, grammar=grammar))


def _model_not_found(name: str, served: str) -> RequestError:
    return RequestError(
        f"the model {name!r:.200} does not exist here; served: {served}",
        param="model",
        code="model_not_found",
    )
