"""The gateway's HTTP routes: reads and validates requests, and starts their generation. How an
answer is written is `answer`'s."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from gateway.admission import Admission
from gateway.api.answer import answer_stream, answer_whole
from gateway.api.bodies import B, ChatBody, CompletionBody, GenerationBody, decode_body
from gateway.api.cross_origin import CrossOrigin
from gateway.api.errors import body_too_large, http_error
from gateway.api.grammar_reader import GrammarReader
from gateway.api.info_routes import InfoRoutes, model_not_found
from gateway.api.job import Job
from gateway.api.request_body import content_coding, decompress
from gateway.api.requests import (
    CHOICES_MAX,
    ChoiceSize,
    RequestOptions,
    check_num_logprobs,
    read_messages,
    read_options,
    read_prompts,
)
from gateway.api.responses import Header
from gateway.api.routes import Handler, Routes, endpoint_of
from gateway.api.token_routes import DetokenizeBody, TokenizeBody, detokenize, tokenize
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
        grammars: GrammarReader,
        body_bytes_max: int,
        logprobs_max: int,
        cross_origin: CrossOrigin,
    ) -> None:
        self._driver = driver
        self._admission = admission
        self._clock = clock
        self._metrics = metrics
        self._health = health
        self._models = models
        self._grammars = grammars
        self._logprobs_max = logprobs_max
        self._body_bytes_max = body_bytes_max
        self._cross_origin = cross_origin

    def build(self, *outer: Middleware) -> web.Application:
        """`outer` are middlewares around its own ones, the outermost first."""
        app = web.Application(
            middlewares=[*outer, self._cross_origin.answer_preflight, self._handle_errors],
            client_max_size=self._body_bytes_max,
        )
        app.on_response_prepare.append(self._cross_origin.on_prepare)
        self._routes = routes = Routes(app.router, body_bytes_max=self._body_bytes_max)
        routes.post("/v1/chat/completions", self._chat)
        routes.post("/v1/completions", self._completions)
        routes.post("/tokenize", self._tokenize)
        routes.post("/detokenize", self._detokenize)
        info = InfoRoutes(
            driver=self._driver,
            health=self._health,
            metrics=self._metrics,
            require_model=self._require_served_model,
        )
        info.add_to(routes)
        return app

    @web.middleware
    async def _handle_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns every failure into OpenAI's error shape, and counts every answer."""
        try:
            response = await handler(request)
        except StarfishError as error:
            response = http_error(error).response()
        except web.HTTPRequestEntityTooLarge:
            response = http_error(body_too_large(self._body_bytes_max)).response()
        except web.HTTPException as error:
            response = self._routes.error_for(request, error).response()
        except Exception:  # the outermost loop of a request
            log.exception("request_crashed", path=request.path)
            response = http_error(
                StarfishError("the gateway failed; its log has the details")
            ).response()
        if self._health.draining:
            response.force_close()
        self._metrics.on_request(endpoint_of(request), response.status)
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        served = await self._require_served_model()
        body = await self._read(request, ChatBody)
        limits = self._check(served, body)
        options = await self._read_options(served, body, limits)
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
        options = await self._read_options(served, body, limits)
        prompts = [
            await served.tokenizer.encode(prompt, tokens_max=limits.context_tokens_max)
            if isinstance(prompt, str)
            else prompt
            for prompt in read_prompts(body, limits.vocab_size)
        ]
        if not all(prompts):
            raise RequestError("the prompt has no tokens", param="prompt")
        return await self._run(request, self._job(served, options, prompts, limits, False))

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        served = await self._require_served_model()
        body = await self._read(request, TokenizeBody)
        self._check_name(served, body.model)
        limits = served.limits(self._driver.view)
        plain = await tokenize(served, body, limits, chars_max=self._body_bytes_max)
        return web.json_response(plain)

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        served = await self._require_served_model()
        body = await self._read(request, DetokenizeBody)
        self._check_name(served, body.model)
        return web.json_response(detokenize(served, body, served.limits(self._driver.view)))

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
            raise body_too_large(self._body_bytes_max)
        coding = content_coding(request.headers.get("Content-Encoding", ""))
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                raw = await request.read()
        except TimeoutError as error:
            raise RequestError("the body did not arrive in time", code="request_timeout") from error
        if coding is not None:
            raw = await asyncio.to_thread(decompress, raw, coding, self._body_bytes_max)
        return decode_body(raw, cls)

    async def _read_options(
        self, served: ServedModel, body: GenerationBody, limits: ModelLimits
    ) -> RequestOptions:
        options = read_options(body, limits)
        grammar = await self._grammars.read(body, served)
        return replace(options, sampling=replace(options.sampling, grammar=grammar))

    def _check(self, served: ServedModel, body: GenerationBody) -> ModelLimits:
        self._check_name(served, body.model)
        return served.limits(self._driver.view)

    def _check_name(self, served: ServedModel, name: str | None) -> None:
        """Raises RequestError."""
        if name and name not in served.names:
            raise model_not_found(name, served)

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
        sizes = [ChoiceSize(len(task.prompt), task.sampling.max_tokens) for task in tasks]
        check_num_logprobs(options, sizes, self._logprobs_max)
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
