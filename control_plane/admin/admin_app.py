"""The admin API over HTTP. Every control plane serves it: the leader answers, the others pass on to
it. What may be asked, `bodies` and `orchestrators` say; what becomes of it, `desired_changes`."""

from __future__ import annotations

import asyncio
import signal
import ssl
import uuid
from functools import partial

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from control_plane.admin.admin_control import AdminControl
from control_plane.admin.authentication import require_token
from control_plane.admin.bodies import ChangeBody, KillBody
from control_plane.admin.change_answer import CHANGES, WITHOUT_BODY, ChangeAnswer, answer_of
from control_plane.admin.client_figures import ClientFigures, ClientsAnswer
from control_plane.admin.description import ADMIN_API
from control_plane.admin.errors import (
    ChangeRefused,
    error_response,
    http_error_response,
)
from control_plane.admin.experts import ExpertsAnswer, experts_of
from control_plane.admin.forwarder import FORWARDED, Forwarder
from control_plane.admin.json_bodies import RAW_BODY, decode, digest_of, json_answer
from control_plane.admin.orchestrator_routes import OrchestratorRoutes
from control_plane.admin.page import PATH as PAGE_PATH
from control_plane.admin.page import page_response
from control_plane.admin.status import StatusAnswer, Survival, status_of, survival_of
from control_plane.desired_changes import Change, Refusal
from shared.clock import Clock
from shared.desired_state import DesiredState
from shared.errors import ConfigError, StarfishError, Unavailable
from shared.openapi import Endpoint, openapi_document
from shared.rank_signal import send_to_rank
from shared.request_body import read_body, uncoded

log = structlog.get_logger()

BODY_BYTES_MAX = 64 << 10
BODY_TIMEOUT_S = 10.0
_KNOWN_POLL_S = 0.005
_KNOWN_TIMEOUT_S = 5.0


class KillAnswer(msgspec.Struct, kw_only=True):
    """The process that got SIGKILL."""

    rank: int
    incarnation: int
    pid: int


class AdminApp:
    """`url` is where this process is reached alone, as its leader record has it. `can_kill`:
    whoever has the token may end a rank's process on this host. `peer_tls` says whose certificates
    are believed of other control planes."""

    def __init__(
        self,
        control: AdminControl,
        *,
        token: bytes,
        url: str,
        clock: Clock,
        figures: ClientFigures,
        can_kill: bool = False,
        peer_tls: ssl.SSLContext | None = None,
    ) -> None:
        self._control = control
        self._token = token
        self._url = url
        self._clock = clock
        self._figures = figures
        self._can_kill = can_kill
        self._forwarder = Forwarder(peer_tls)
        self._endpoints: list[Endpoint] = []
        self._survival: tuple[tuple[int, int], Survival | None] | None = None

    def build(self, *outer: Middleware) -> web.Application:
        """`outer` are middlewares around its own ones."""
        app = web.Application(
            middlewares=[*outer, self._handle_errors, self._admit, self._answer_at_leader],
            client_max_size=BODY_BYTES_MAX,
        )
        app.on_cleanup.append(self._close)
        get, post = partial(self._add, app, "GET"), partial(self._add, app, "POST")
        get("/v1/status", self._status, "what runs, and what is being changed", StatusAnswer)
        get("/v1/experts", self._experts, "where experts are, and their load", ExpertsAnswer)
        get("/v1/clients", self._clients, "what clients get", ClientsAnswer)
        post("/v1/kill", self._kill, "kill -9 of a rank, for a demo", KillAnswer, body=KillBody)
        for name, body, summary in CHANGES:
            handler = partial(self._change, name, body)
            post(
                f"/v1/{name}",
                handler,
                summary,
                ChangeAnswer,
                body=body,
                status=202,
                needs_body=body not in WITHOUT_BODY,
            )
        OrchestratorRoutes(self._control, self._read_status, self._ask).add_to(get, post)
        get("/openapi.json", self._openapi, "this description", None)
        return app

    def _add(
        self,
        app: web.Application,
        method: str,
        path: str,
        handler: Handler,
        summary: str,
        answer: type[msgspec.Struct] | None,
        *,
        body: type[msgspec.Struct] | None = None,
        status: int = 200,
        needs_body: bool = True,
    ) -> None:
        endpoint = Endpoint(
            method=method,
            path=path,
            summary=summary,
            body=body,
            answer=answer,
            status=status,
            needs_body=needs_body,
        )
        self._endpoints.append(endpoint)
        app.router.add_route(method, path, handler)

    async def _close(self, app: web.Application) -> None:
        await self._forwarder.close()
        await self._figures.close()

    # Around every request.

    @web.middleware
    async def _handle_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except StarfishError as error:
            return error_response(error)
        except web.HTTPException as error:
            return http_error_response(error)
        except Exception:  # the outermost loop of a request
            log.exception("admin_request_crashed", path=request.path)
            return error_response(StarfishError("the control plane failed; its log says how"))

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The token comes first: without it, nothing is read, and nothing told but the page, in
        which is nothing of the instance."""
        if request.path == PAGE_PATH and request.method in ("GET", "HEAD"):
            return page_response()
        require_token(request, self._token)
        raw = await read_body(request, BODY_BYTES_MAX, timeout_s=BODY_TIMEOUT_S)
        request[RAW_BODY] = await uncoded(raw, BODY_BYTES_MAX)
        return await handler(request)

    @web.middleware
    async def _answer_at_leader(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Without a leader, what is only shown is answered by whoever was asked."""
        if self._control.leads or request.path == "/openapi.json":
            return await handler(request)
        leader = self._control.state.leader
        is_other = leader is not None and leader.admin_url not in ("", self._url)
        is_shown_only = request.path in _SHOWN
        if leader is not None and is_other and FORWARDED not in request.headers:
            try:
                return await self._forwarder.forward(
                    request,
                    request[RAW_BODY],
                    leader.admin_url,
                    leads=partial(self._is_led_at, leader.admin_url),
                )
            except Unavailable:
                if not is_shown_only:
                    raise
        if is_shown_only:
            return await handler(request)
        raise Unavailable(
            "no control plane leads, or none that is asked here: ask again in a moment, with the "
            "same request_id"
        )

    def _is_led_at(self, url: str) -> bool:
        leader = self._control.state.leader
        return not self._control.leads and leader is not None and leader.admin_url == url

    # The project's own interface.

    async def _status(self, request: web.Request) -> web.Response:
        return json_answer(await self._read_status())

    async def _read_status(self) -> StatusAnswer:
        control = self._control
        return status_of(
            control.state,
            control.load_of,
            self._clock.wall(),
            frozen=control.frozen,
            survives=await self._survives(),
            can_kill=self._can_kill,
            rebalance=control.rebalance,
        )

    async def _experts(self, request: web.Request) -> web.Response:
        """Computed away from the event loop, as what the map survives is."""
        expert_map, loads = self._control.state.expert_map, self._control.expert_loads()
        return json_answer(await asyncio.to_thread(experts_of, expert_map, loads))

    async def _clients(self, request: web.Request) -> web.Response:
        return json_answer(await self._figures.read())

    async def _kill(self, request: web.Request) -> web.Response:
        body = decode(request, KillBody)
        if not self._can_kill:
            raise ChangeRefused(
                "nobody may kill ranks here: start the control planes with --allow-kill, or use "
                "`starfish kill` on the rank's host"
            )
        record = self._control.state.newest_records().get(body.rank)
        if record is None or record.incarnation != body.incarnation:
            raise ChangeRefused(
                f"incarnation {body.incarnation} of rank {body.rank} does not run any more"
            )
        try:
            send_to_rank(record, signal.SIGKILL)
        except ConfigError as error:
            raise ChangeRefused(str(error)) from error
        peer = request.headers.get(FORWARDED) or request.remote
        log.warning("admin_killed", rank=record.rank, incarnation=record.incarnation, peer=peer)
        return json_answer(
            KillAnswer(rank=record.rank, incarnation=record.incarnation, pid=record.pid)
        )

    async def _survives(self) -> Survival | None:
        """Computed once for each map, away from the event loop: a death must not wait for it."""
        state = self._control.state
        epoch = state.expert_map.epoch if state.expert_map is not None else 0
        version = (epoch, len(state.records))
        if self._survival is None or self._survival[0] != version:
            self._survival = version, await asyncio.to_thread(survival_of, state)
        return self._survival[1]

    async def _change(
        self, name: str, body_type: type[ChangeBody], request: web.Request
    ) -> web.Response:
        body = decode(request, body_type)
        change = body.change(self._control.state)
        digest = digest_of(name, request)
        answer = await self._ask(request, name, change, body.request_id, digest)
        return json_answer(answer, status=202)

    async def _ask(
        self, request: web.Request, name: str, change: Change, request_id: str, digest: str
    ) -> ChangeAnswer:
        """Raises ChangeRefused, and what `AdminControl.change` raises."""
        request_id = request_id or uuid.uuid4().hex
        before = self._control.state.desired
        repeated = request_id in before.requests
        result = await self._control.change(change, request_id=request_id, digest=digest)
        peer = request.headers.get(FORWARDED) or request.remote
        if isinstance(result, Refusal):
            log.info("admin_refused", action=name, peer=peer, reason=result.text)
            raise ChangeRefused(result.text)
        await self._wait_until_known(result)
        changed = result.change != before.change
        log.info(
            "admin_accepted",
            action=name,
            peer=peer,
            request_id=request_id,
            change=result.change,
            changed=changed,
        )
        spec = self._control.state.spec
        num_ranks = spec.num_ranks if spec is not None else 0
        return answer_of(result, request_id, num_ranks, changed=changed, repeated=repeated)

    async def _wait_until_known(self, desired: DesiredState) -> None:
        """Who asks for the status next must find the change in it."""
        try:
            async with asyncio.timeout(_KNOWN_TIMEOUT_S):
                while self._control.state.desired.change < desired.change:  # noqa: ASYNC110
                    await asyncio.sleep(_KNOWN_POLL_S)
        except TimeoutError:
            raise Unavailable(
                "the change is written, but this control plane has not heard of it; ask again with "
                "the same request_id"
            ) from None

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(openapi_document(ADMIN_API, self._endpoints))


_SHOWN = ("/v1/status", "/v1/experts", "/v1/clients")
