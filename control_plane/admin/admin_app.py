"""The admin API over HTTP. Every control plane serves it: the leader answers, the others pass on to
it. What may be asked, `bodies` and `orchestrators` say; what becomes of it, `desired_changes`."""

from __future__ import annotations

import asyncio
import signal
import ssl
import uuid
from functools import partial
from typing import Protocol, TypeVar

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from control_plane.admin.authentication import require_token
from control_plane.admin.bodies import ChangeBody, KillBody, digest_of
from control_plane.admin.change_answer import CHANGES, WITHOUT_BODY, ChangeAnswer, answer_of
from control_plane.admin.client_figures import ClientFigures, ClientsAnswer
from control_plane.admin.description import ADMIN_API
from control_plane.admin.errors import (
    ChangeRefused,
    TookTooLong,
    error_response,
    http_error_response,
)
from control_plane.admin.experts import ExpertsAnswer, experts_of
from control_plane.admin.forwarder import FORWARDED, Forwarder
from control_plane.admin.orchestrators import (
    ApplyAnswer,
    ApplyBody,
    FaultToleranceAnswer,
    IsScalingAnswer,
    ScaledAnswer,
    ScaleElasticEpBody,
    fault_tolerance_of,
    is_scaled,
    is_scaling_of,
)
from control_plane.admin.page import PATH as PAGE_PATH
from control_plane.admin.page import page_response
from control_plane.admin.status import StatusAnswer, Survival, status_of, survival_of
from control_plane.cluster_state import ClusterState
from control_plane.desired_changes import Change, Refusal
from control_plane.healing import RebalanceProgress
from control_plane.known_requests import why_reused
from control_plane.placement.topology import Floats
from shared.clock import Clock
from shared.desired_state import DesiredState
from shared.errors import ConfigError, RequestError, StarfishError, Unavailable
from shared.openapi import Endpoint, openapi_document
from shared.rank_signal import send_to_rank
from shared.request_body import read_body, uncoded
from shared.types import Member
from shared.wire import Load

log = structlog.get_logger()

BODY_BYTES_MAX = 64 << 10
BODY_TIMEOUT_S = 10.0
_POLL_S = 0.1
_KNOWN_POLL_S = 0.005
_KNOWN_TIMEOUT_S = 5.0
_WAIT_BEYOND_DRAIN_S = 60.0
"""How long a call as vLLM's waits beyond its drain_timeout: ranks that come load their experts."""

_B = TypeVar("_B", bound=msgspec.Struct)
_RAW_BODY = web.RequestKey("raw_body", bytes)


class KillAnswer(msgspec.Struct, kw_only=True):
    """The process that got SIGKILL."""

    rank: int
    incarnation: int
    pid: int


class AdminControl(Protocol):
    """What the API needs of a control plane (`Driver`)."""

    @property
    def state(self) -> ClusterState: ...

    @property
    def leads(self) -> bool: ...

    @property
    def frozen(self) -> bool: ...

    def load_of(self, member: Member) -> Load | None: ...

    def expert_loads(self) -> Floats | None: ...

    @property
    def rebalance(self) -> RebalanceProgress: ...

    async def change(
        self, change: Change, *, request_id: str = "", digest: str = ""
    ) -> DesiredState | Refusal: ...


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
        get("/v1/fault_tolerance/status", self._ft_status, "as vLLM has it", FaultToleranceAnswer)
        post(
            "/v1/fault_tolerance/apply",
            self._ft_apply,
            "as vLLM has it",
            ApplyAnswer,
            body=ApplyBody,
            status=202,
        )
        post(
            "/scale_elastic_ep",
            self._scale_elastic_ep,
            "as vLLM and SGLang have it",
            ScaledAnswer,
            body=ScaleElasticEpBody,
        )
        for add in (get, post):
            add(
                "/is_scaling_elastic_ep",
                self._is_scaling,
                "as vLLM and SGLang have it",
                IsScalingAnswer,
            )
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
        request[_RAW_BODY] = await uncoded(raw, BODY_BYTES_MAX)
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
                return await self._forwarder.forward(request, request[_RAW_BODY], leader.admin_url)
            except Unavailable:
                if not is_shown_only:
                    raise
        if is_shown_only:
            return await handler(request)
        raise Unavailable(
            "no control plane leads, or none that is asked here: ask again in a moment, with the "
            "same request_id"
        )

    # The project's own interface.

    async def _status(self, request: web.Request) -> web.Response:
        return _answer(await self._read_status())

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
        return _answer(await asyncio.to_thread(experts_of, expert_map, loads))

    async def _clients(self, request: web.Request) -> web.Response:
        return _answer(await self._figures.read())

    async def _kill(self, request: web.Request) -> web.Response:
        body = _decode(request, KillBody)
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
        return _answer(KillAnswer(rank=record.rank, incarnation=record.incarnation, pid=record.pid))

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
        body = _decode(request, body_type)
        change = body.change(self._control.state)
        answer = await self._ask(
            request, name, change, body.request_id, digest_of(name, request[_RAW_BODY])
        )
        return _answer(answer, status=202)

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

    # As other servers have it.

    async def _ft_status(self, request: web.Request) -> web.Response:
        return _answer(fault_tolerance_of(await self._read_status()))

    async def _ft_apply(self, request: web.Request) -> web.Response:
        body = _decode(request, ApplyBody)
        name, change = f"fault_tolerance {body.instruction}", body.change()
        digest = digest_of(name, request[_RAW_BODY])
        if reused := why_reused(self._control.state.desired, body.request_id, digest):
            raise ChangeRefused(reused)
        message = "nothing to do: ranks come back by themselves"
        if change is not None:
            answer = await self._ask(request, name, change, body.request_id, digest)
            message = answer.message.replace("/v1/status", "/v1/fault_tolerance/status")
        return _answer(ApplyAnswer(message=message, request_id=body.request_id), status=202)

    async def _is_scaling(self, request: web.Request) -> web.Response:
        return _answer(await self._read_is_scaling())

    async def _read_is_scaling(self) -> IsScalingAnswer:
        spec = self._control.state.spec
        return is_scaling_of(await self._read_status(), spec.num_ranks if spec is not None else 0)

    async def _scale_elastic_ep(self, request: web.Request) -> web.Response:
        body = _decode(request, ScaleElasticEpBody)
        size, change = body.size, body.change()
        old = (await self._read_is_scaling()).effective_ep_size
        asked = await self._ask(request, "scale_elastic_ep", change, "", "")
        if not body.waits:
            message = f"scales from {old} to {size} ranks; /is_scaling_elastic_ep says how far"
            return _answer(ScaledAnswer(message=message, old_ep_size=old, new_ep_size=size))
        try:
            async with asyncio.timeout(body.drain_timeout + _WAIT_BEYOND_DRAIN_S):
                await self._wait_until_scaled(size, asked.change)
        except TimeoutError:
            raise TookTooLong(
                f"{size} ranks were not there in time; the change goes on, and "
                "/is_scaling_elastic_ep says how far"
            ) from None
        return _answer(ScaledAnswer(message=f"Scaled to {size} data parallel engines"))

    async def _wait_until_scaled(self, size: int, change: int) -> None:
        """Raises Unavailable if another control plane leads from now on, and ChangeRefused if
        somebody has asked for another size after `change`."""
        while True:
            await asyncio.sleep(_POLL_S)
            if not self._control.leads:
                raise Unavailable("this control plane leads no more; the change goes on")
            status = await self._read_status()
            num_desired = sum(rank.desired for rank in status.ranks)
            if num_desired != size:
                raise ChangeRefused(
                    f"not scaled to {size} ranks: somebody has changed the plan meanwhile (change "
                    f"{status.change.number} after {change}), and {num_desired} ranks shall exist"
                )
            if is_scaled(status):
                return

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(openapi_document(ADMIN_API, self._endpoints))


_SHOWN = ("/v1/status", "/v1/experts", "/v1/clients")


def _decode(request: web.Request, kind: type[_B]) -> _B:
    """Raises RequestError. An empty body is an empty object."""
    try:
        return msgspec.json.decode(request[_RAW_BODY] or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not what is asked for here: {error}") from error


def _answer(value: msgspec.Struct, *, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json"
    )
