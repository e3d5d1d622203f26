"""The gateway's HTTP routes: reads and validates requests, and starts their generation. How an
answer is written is `answer`'s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from gateway.api.answer import AnswerJob, answer_job, answer_read
from gateway.api.answer_plan import AnswerPlan
from gateway.api.anthropic.answer import error_body as messages_error
from gateway.api.authentication import Authenticator
from gateway.api.bodies import B, ChatBody, CompletionBody, GenerationBody
from gateway.api.body_decoder import BodyDecoder
from gateway.api.chat_request import plan_answer, read_chat
from gateway.api.cross_origin import CrossOrigin
from gateway.api.dialect import Dialect
from gateway.api.dialect_answer import answer_job_in
from gateway.api.dialect_routes import MESSAGES_PATH, DialectRoutes
from gateway.api.errors import HttpError, http_error
from gateway.api.grammar_reader import GrammarReader
from gateway.api.guidance import answer_grammar
from gateway.api.guided import DemandedForm
from gateway.api.ignored_fields import IGNORED_FIELDS, name_ignored_fields
from gateway.api.info_routes import InfoRoutes, model_not_found
from gateway.api.job import Job
from gateway.api.job_builder import JobBuilder
from gateway.api.openai_responses.store import ResponseStore
from gateway.api.rate_headers import RateHeaders
from gateway.api.refusal_pace import RefusalPace
from gateway.api.request_admission import RequestAdmission, num_choices
from gateway.api.request_context import require_context
from gateway.api.request_log import RequestLog, name_request
from gateway.api.request_tokens import encoded_prompt, with_tokens
from gateway.api.request_trace import RequestTraces
from gateway.api.requests import read_options, read_prompts
from gateway.api.responses import DONE
from gateway.api.resumption import Resumption, Stream, check_not_resumed
from gateway.api.routes import Handler, Routes, ask_for_body, awaits_body, endpoint_of
from gateway.api.scheduling import RequestScheduling
from gateway.api.token_routes import DetokenizeBody, TokenizeBody, detokenize, tokenize
from gateway.generation import Generation
from gateway.health import Health
from gateway.metrics import GatewayMetrics
from gateway.model_loader import ModelLoader
from gateway.piece_pace import PiecePace
from gateway.prompt import Prompt
from gateway.request_tag import RequestTag
from gateway.served_model import ModelLimits, ServedModel
from gateway.session_driver import SessionDriver
from shared.clock import Clock
from shared.errors import RequestError, StarfishError, Unavailable
from shared.request_body import body_too_large
from shared.tracing import Tracer

log = structlog.get_logger()

RESPONSES_BYTES_MAX = 64 << 20
"""Size of what the Responses API remembers."""
MODEL_WAIT_S = 5.0
"""How long a request waits for a model that is not loaded yet."""


class HttpApp:
    def __init__(
        self,
        *,
        driver: SessionDriver,
        admission: RequestAdmission,
        authenticator: Authenticator,
        pace: PiecePace,
        refusals: RefusalPace,
        request_log: RequestLog,
        clock: Clock,
        metrics: GatewayMetrics,
        health: Health,
        models: ModelLoader,
        grammars: GrammarReader,
        resumption: Resumption,
        body_bytes_max: int,
        logprobs_max: int,
        cross_origin: CrossOrigin,
        tracer: Tracer | None = None,
    ) -> None:
        self._driver = driver
        self._admission = admission
        self._authenticator = authenticator
        self._pace = pace
        self._request_log = request_log
        self._clock = clock
        self._metrics = metrics
        self._health = health
        self._models = models
        self._grammars = grammars
        self._resumption = resumption
        self._jobs = JobBuilder(clock=clock, logprobs_max=logprobs_max)
        self._decoder = BodyDecoder(body_bytes_max)
        self._body_bytes_max = body_bytes_max
        self._cross_origin = cross_origin
        traces = [RequestTraces(tracer).trace_request] if tracer is not None else []
        self._around = [*traces, cross_origin.answer_preflight, refusals.hold_back]

    def build(self, *outer: Middleware) -> web.Application:
        """`outer` are middlewares around its own ones, the outermost first."""
        app = web.Application(
            middlewares=[
                *outer,
                self._request_log.log_request,
                *self._around,
                self._handle_errors,
                self._authenticator.authenticate,
            ],
            client_max_size=self._body_bytes_max,
        )
        app.on_response_prepare.append(self._cross_origin.on_prepare)
        app.on_response_prepare.append(name_ignored_fields)
        app.on_response_prepare.append(name_request)
        app.on_response_prepare.append(RateHeaders(self._clock).add)
        self._routes = routes = Routes(app.router)
        routes.post(
            "/v1/chat/completions", self._chat, "answers a chat", body=ChatBody, streams=True
        )
        routes.post(
            "/v1/completions",
            self._completions,
            "goes on with texts",
            body=CompletionBody,
            streams=True,
        )
        routes.post("/tokenize", self._tokenize, "the token ids of a text", body=TokenizeBody)
        routes.post("/detokenize", self._detokenize, "the text of token ids", body=DetokenizeBody)
        info = InfoRoutes(
            driver=self._driver,
            health=self._health,
            metrics=self._metrics,
            require_model=self._require_served_model,
        )
        info.add_to(routes)
        dialects = DialectRoutes(
            answer_chat=self.answer_chat,
            answer_completion=self.answer_completion,
            count_prompt=self.count_prompt,
            store=ResponseStore(RESPONSES_BYTES_MAX),
        )
        dialects.add_to(routes)
        return app

    @web.middleware
    async def _handle_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns every failure into OpenAI's error shape, and counts every answer."""
        context = require_context(request)
        try:
            response = await handler(request)
        except (StarfishError, web.HTTPException) as error:
            response = _shaped(request, self._problem(request, error)).response()
        except RecursionError:  # in what was made of its body
            deep = RequestError("the body is nested too deeply", code="invalid_json")
            response = _shaped(request, http_error(deep)).response()
        except Exception:  # the outermost loop of a request
            log.exception("request_crashed", path=request.path)
            problem = http_error(StarfishError("the gateway failed; its log has the details"))
            response = _shaped(request, problem).response()
        if self._health.draining or awaits_body(request):
            response.force_close()
        self._metrics.on_request(endpoint_of(request), response.status)
        if context.account is not None:
            self._metrics.on_key_request(
                context.key.name,
                response.status,
                num_prompt_tokens=context.num_prompt_tokens,
                num_generated=context.num_generated,
            )
        return response

    def _problem(self, request: web.Request, error: StarfishError | web.HTTPException) -> HttpError:
        if isinstance(error, StarfishError):
            return http_error(error)
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            return http_error(body_too_large(self._body_bytes_max))
        return self._routes.error_for(request, error)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self.answer_chat(request, ChatBody, lambda body: body, None)

    async def answer_chat(
        self,
        request: web.Request,
        cls: type[B],
        chat_of: Callable[[B], ChatBody],
        dialect_of: Callable[[Job], Dialect] | None,
    ) -> web.StreamResponse:
        """Answers a chat whose body is of type `cls`. `dialect_of`: how the answer is spelt, if not
        as OpenAI's chat completions."""
        with self._admission.enter(request):
            served = await self._require_served_model()
            body = chat_of(await self._read(request, cls))
            limits = self._check(served, body)
            scheduling = self._admission.reserve(request, body, limits)
            stream = self._stream(request, body, served)
            async with self._admission.turn(request, expires_at=scheduling.expires_at):
                options = read_options(body, limits).of_stream(stream, body.seed)
                chat = read_chat(body, served)
                form = chat.form(self._grammars.form_of(body))
                ids = await served.tokenizer.encode_chat(
                    chat.messages,
                    chat.options.at(None if stream is None else stream.created),
                    tokens_max=options.prompt_tokens_max(limits),
                )
                if not ids:
                    raise RequestError("the prompt has no tokens", param="messages")
                prompt = options.fitted(Prompt(ids=ids), limits)
                plan = plan_answer(body, chat, served, prompt.ids, demands_form=form is not None)
                options = await with_tokens(body, options, served, plan)
            grammar = await self._grammar(request, body, form, plan, served, scheduling)
            job = self._jobs.build(
                served,
                options.guided_by(grammar, forces_call=plan.must_call),
                [prompt],
                limits,
                scheduling,
                plan=plan,
                stream=stream,
                names_seed=body.seed is None,
            )
            answer = partial(answer_job_in, dialect_of(job)) if dialect_of else answer_job
            return await self._run(request, job, answer)

    async def count_prompt(
        self, request: web.Request, cls: type[B], chat_of: Callable[[B], ChatBody]
    ) -> int:
        """The number of tokens of a chat's prompt."""
        with self._admission.enter(request):
            served = await self._require_served_model()
            body = chat_of(await self._read(request, cls))
            self._check(served, body)
            async with self._admission.turn(request):
                chat = read_chat(body, served)
                most = self._body_bytes_max
                ids = await served.tokenizer.encode_chat(
                    chat.messages, chat.options, tokens_max=most
                )
            return len(ids)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self.answer_completion(
            request, CompletionBody, lambda body: body, lambda body: answer_job
        )

    async def answer_completion(
        self,
        request: web.Request,
        cls: type[B],
        completion_of: Callable[[B], CompletionBody],
        answer_of: Callable[[B], AnswerJob],
    ) -> web.StreamResponse:
        """Goes on with the texts of a body of type `cls`. `answer_of`: how that is answered."""
        with self._admission.enter(request):
            served = await self._require_served_model()
            sent = await self._read(request, cls)
            body = completion_of(sent)
            answer = answer_of(sent)
            limits = self._check(served, body)
            scheduling = self._admission.reserve(request, body, limits)
            stream = self._stream(request, body, served, has_ids=answer is answer_job)
            async with self._admission.turn(request, expires_at=scheduling.expires_at):
                form = self._grammars.form_of(body)
                options = read_options(body, limits).of_stream(stream, body.seed)
                options = await with_tokens(body, options, served)
                prompts = [
                    options.fitted(await encoded_prompt(served, prompt, options, limits), limits)
                    for prompt in read_prompts(body, limits.vocab_size)
                ]
            if not all(prompt.ids for prompt in prompts):
                raise RequestError("the prompt has no tokens", param="prompt")
            grammar = await self._grammar(request, body, form, None, served, scheduling)
            job = self._jobs.build(
                served,
                options.guided_by(grammar),
                prompts,
                limits,
                scheduling,
                stream=stream,
                names_seed=body.seed is None,
            )
            return await self._run(request, job, answer)

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        with self._admission.enter(request):
            served = await self._require_served_model()
            body = await self._read(request, TokenizeBody)
            self._check_name(served, body.model)
            limits = served.limits(self._driver.view)
            async with self._admission.turn(request):
                answer = await tokenize(served, body, limits, chars_max=self._body_bytes_max)
            return web.Response(body=answer, content_type="application/json")

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        with self._admission.enter(request):
            served = await self._require_served_model()
            body = await self._read(request, DetokenizeBody)
            self._check_name(served, body.model)
            async with self._admission.turn(request):
                answer = await detokenize(served, body, served.limits(self._driver.view))
            return web.Response(body=answer, content_type="application/json")

    async def _require_served_model(self) -> ServedModel:
        """Raises Unavailable with what is being waited for. A gateway that has just started needs
        a moment to read etcd and the tokenizer, which its clients need not notice."""
        if self._health.refuses:
            raise Unavailable("the gateway is shutting down")
        served = await self._models.wait(MODEL_WAIT_S)
        if served is None:
            raise Unavailable("not ready: " + "; ".join(self._health.reasons_not_ready()))
        return served

    async def _read(self, request: web.Request, cls: type[B]) -> B:
        ask_for_body(request, self._body_bytes_max)
        context = require_context(request)
        # Without keys, addresses take turns.
        waits_as = msgspec.structs.replace(context.key, name=context.line)
        turn = partial(self._pace.body_turn, context.line)
        decoded = await self._decoder.read(request, waits_as, cls, turn=turn)
        context.body_bytes = decoded.num_bytes
        context.body_digest = decoded.digest
        request[IGNORED_FIELDS] = decoded.ignored
        return decoded.body

    async def _grammar(
        self,
        request: web.Request,
        body: GenerationBody,
        form: DemandedForm | None,
        plan: AnswerPlan | None,
        served: ServedModel,
        scheduling: RequestScheduling,
    ) -> str:
        """What the answer follows; empty if nothing guides it."""
        if form is None and (plan is None or not plan.guides_calls):
            return ""
        async with self._admission.grammar_turn(request, expires_at=scheduling.expires_at):
            return await answer_grammar(body, form, plan, served, self._grammars)

    def _stream(
        self,
        request: web.Request,
        body: GenerationBody,
        served: ServedModel,
        *,
        has_ids: bool = True,
    ) -> Stream | None:
        """None if the answer is not streamed, or its events have no ids. Raises RequestError."""
        if not (body.stream and has_ids):
            check_not_resumed(request, streams=bool(body.stream))
            return None
        return self._resumption.open(
            request, fingerprint=served.fingerprint, num_choices=num_choices(body)
        )

    def _check(self, served: ServedModel, body: GenerationBody) -> ModelLimits:
        self._check_name(served, body.model)
        return served.limits(self._driver.view)

    def _check_name(self, served: ServedModel, name: str | None) -> None:
        """Raises RequestError."""
        if name and name not in served.names:
            raise model_not_found(name, served)

    async def _run(self, request: web.Request, job: Job, answer: AnswerJob) -> web.StreamResponse:
        context = require_context(request)
        context.num_prompt_tokens = job.num_prompt_tokens
        if job.is_all_read:
            return await answer_read(request, DONE if answer is answer_job else b"")
        self._admission.correct(request, tokens=sum(task.tokens for task in job.tasks))
        generation = Generation(
            driver=self._driver,
            token_bytes=job.names.text,
            tasks=job.tasks,
            # What is parsed is read as it comes: at its end it would hold up the event loop.
            streaming=job.options.stream or job.is_parsed,
            turn=partial(self._pace.choices_turn, context.line),
            tag=RequestTag(request_id=context.id, endpoint=endpoint_of(request), span=context.span),
        )
        try:
            async with generation:
                return await answer(request, generation, job)
        finally:
            context.num_generated = generation.num_generated
            num_prompt_tokens = sum(len(task.prompt) for task in job.tasks)
            self._admission.use(request, tokens=num_prompt_tokens + context.num_generated)


def _shaped(request: web.Request, error: HttpError) -> HttpError:
    """The error in the shape of the API that was asked, with the request's id."""
    request_id = require_context(request).id
    if request.path.startswith(MESSAGES_PATH):
        return replace(error, body=messages_error(error, request_id))
    return error.of_request(request_id)
