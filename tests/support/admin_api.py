"""The admin API of a control plane that decides as the real one does, on a cluster state that a
test makes, behind real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from control_plane.admin.admin_app import AdminApp
from control_plane.admin.admin_server import LIMITS, serving
from control_plane.admin.client_figures import ClientFigures
from control_plane.cluster_state import ClusterState
from control_plane.desired_changes import Change, Refusal, change_desired
from control_plane.healing import RebalanceProgress
from control_plane.placement.topology import Floats
from shared.connection_table import ConnectionLimits
from shared.desired_state import DesiredState
from shared.errors import StarfishError
from shared.expert_map import ExpertMap
from shared.listener import listen_on
from shared.records import GatewayRecord
from shared.types import Member
from shared.wire import Load
from tests.support.fake_clock import FakeClock

TOKEN = b"0123456789abcdef" * 4
HEADERS = {"Authorization": f"Bearer {TOKEN.decode()}"}


class FakeControl:
    """It leads unless a test says otherwise. `errors` are raised by the next changes."""

    def __init__(self, state: ClusterState, clock: FakeClock) -> None:
        self.state = state
        self.leads = True
        self.frozen = False
        self.loads: dict[Member, Load] = {}
        self.loads_LE: Floats | None = None
        self.rebalance = RebalanceProgress()
        self.errors: list[StarfishError] = []
        self._clock = clock

    def expert_loads(self) -> Floats | None:
        return self.loads_LE

    def load_of(self, member: Member) -> Load | None:
        return self.loads.get(member)

    async def change(
        self, change: Change, *, request_id: str = "", digest: str = ""
    ) -> DesiredState | Refusal:
        if self.errors:
            raise self.errors.pop(0)
        result = change_desired(
            self.state, change, self._clock.wall(), request_id=request_id, digest=digest
        )
        if isinstance(result, DesiredState):
            self.state = replace(self.state, desired=result)
        return result

    def leave_map(self, rank: int) -> None:
        """As if the rank had been drained."""
        old = self.state.expert_map
        assert old is not None
        members = tuple(member for member in old.members if member.rank != rank)
        expert_map = ExpertMap(
            epoch=type(old.epoch)(old.epoch + 1),
            num_experts=old.num_experts,
            members=members,
            placement=old.placement,
        )
        self.state = replace(self.state, expert_map=expert_map)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str]

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])


class AdminClient:
    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http

    async def ask(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> Answer:
        """`body`: bytes as they are, anything else as JSON. With the token, unless `headers` says
        otherwise."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = HEADERS if headers is None else headers
        async with self.http.request(method, self.url + path, data=data, headers=sent) as response:
            text = await response.read()
            return Answer(
                status=response.status, body=json.loads(text), headers=dict(response.headers)
            )

    async def get(self, path: str) -> Answer:
        return await self.ask("GET", path)

    async def post(self, path: str, body: Any = None) -> Answer:
        return await self.ask("POST", path, body)


@asynccontextmanager
async def admin_api(
    control: FakeControl,
    clock: FakeClock,
    gateways: Sequence[GatewayRecord] = (),
    *,
    can_kill: bool = False,
    limits: ConnectionLimits = LIMITS,
) -> AsyncIterator[AdminClient]:
    async def known() -> list[GatewayRecord]:
        return list(gateways)

    listener = listen_on("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    figures = ClientFigures(known)
    app = AdminApp(control, token=TOKEN, url=url, clock=clock, figures=figures, can_kill=can_kill)
    async with serving(app, [listener], limits=limits), aiohttp.ClientSession() as http:
        yield AdminClient(url, http)
