"""The paths at which other servers' orchestrators ask, as vLLM and SGLang have them. What they say,
and what it means here, is `orchestrators`' matter."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiohttp import web

from control_plane.admin.admin_control import AdminControl
from control_plane.admin.change_answer import ChangeAnswer
from control_plane.admin.errors import ChangeRefused, TookTooLong
from control_plane.admin.json_bodies import decode, digest_of, json_answer
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
from control_plane.admin.status import StatusAnswer
from control_plane.desired_changes import Change
from control_plane.known_requests import why_reused
from shared.errors import Unavailable

FAULT_TOLERANCE = ("/fault_tolerance", "/v1/fault_tolerance")
"""Of today's vLLM, and of earlier ones."""
_POLL_S = 0.1
_WAIT_BEYOND_DRAIN_S = 60.0
"""How long a call as vLLM's waits beyond its drain_timeout: ranks that come load their experts."""


class Ask(Protocol):
    """Asks for a change, as `AdminApp` does it for its own paths."""

    async def __call__(
        self, request: web.Request, name: str, change: Change, request_id: str, digest: str
    ) -> ChangeAnswer: ...


class OrchestratorRoutes:
    def __init__(
        self, control: AdminControl, read_status: Callable[[], Awaitable[StatusAnswer]], ask: Ask
    ) -> None:
        self._control = control
        self._read_status = read_status
        self._ask = ask

    def add_to(self, get: Callable[..., None], post: Callable[..., None]) -> None:
        """`get` and `post` add a path: its handler, its summary, the types of answer and body."""
        for folder in FAULT_TOLERANCE:
            get(f"{folder}/status", self._ft_status, "as vLLM has it", FaultToleranceAnswer)
            apply = f"{folder}/apply"
            post(apply, self._ft_apply, "as vLLM has it", ApplyAnswer, body=ApplyBody, status=202)
        both = "as vLLM and SGLang have it"
        post(
            "/scale_elastic_ep", self._scale_elastic_ep, both, ScaledAnswer, body=ScaleElasticEpBody
        )
        for add in (get, post):
            add("/is_scaling_elastic_ep", self._is_scaling, both, IsScalingAnswer)

    async def _ft_status(self, request: web.Request) -> web.Response:
        return json_answer(fault_tolerance_of(await self._read_status()))

    async def _ft_apply(self, request: web.Request) -> web.Response:
        body = decode(request, ApplyBody)
        name, change = f"fault_tolerance {body.instruction}", body.change()
        digest = digest_of(name, request)
        request_id = body.request_id or uuid.uuid4().hex
        if reused := why_reused(self._control.state.desired, request_id, digest):
            raise ChangeRefused(reused)
        message = "nothing to do: ranks come back by themselves"
        if change is not None:
            asked = await self._ask(request, name, change, request_id, digest)
            message = asked.message.replace("/v1/status", f"{FAULT_TOLERANCE[0]}/status")
        return json_answer(ApplyAnswer(message=message, request_id=request_id), status=202)

    async def _is_scaling(self, request: web.Request) -> web.Response:
        return json_answer(await self._read_is_scaling())

    async def _read_is_scaling(self) -> IsScalingAnswer:
        spec = self._control.state.spec
        return is_scaling_of(await self._read_status(), spec.num_ranks if spec is not None else 0)

    async def _scale_elastic_ep(self, request: web.Request) -> web.Response:
        body = decode(request, ScaleElasticEpBody)
        size, change = body.size, body.change()
        old = (await self._read_is_scaling()).effective_ep_size
        asked = await self._ask(request, "scale_elastic_ep", change, "", "")
        if not body.waits:
            message = f"scales from {old} to {size} ranks; /is_scaling_elastic_ep says how far"
            return json_answer(ScaledAnswer(message=message, old_ep_size=old, new_ep_size=size))
        try:
            async with asyncio.timeout(body.drain_timeout + _WAIT_BEYOND_DRAIN_S):
                await self._wait_until_scaled(size, asked.change)
        except TimeoutError:
            raise TookTooLong(
                f"{size} ranks were not there in time; the change goes on, and "
                "/is_scaling_elastic_ep says how far"
            ) from None
        return json_answer(ScaledAnswer(message=f"Scaled to {size} data parallel engines"))

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
