"""The admin API and strangers: who has no token learns nothing and changes nothing, on whichever
path; nothing tells the token; and who only connects is soon gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from aiohttp import web

from cli.up.options import UpOptions
from cli.up.run_folder import RunFolder
from cli.up.services import control_plane
from control_plane.__main__ import open_admin_api
from control_plane.admin.admin_server import LIMITS
from control_plane.admin.authentication import read_admin_token
from control_plane.config import ControlPlaneConfig
from shared.desired_state import DesiredState
from shared.errors import ConfigError
from shared.etcd_options import EtcdOptions
from shared.records import LeaderRecord, pack_record
from tests.support.admin_api import HEADERS, TOKEN, AdminClient, FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.desired import agent, state_of

SECRETS = (TOKEN.decode(), TOKEN.decode()[:32])


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(state_of(agent("a", 0, 1), agent("b", 2, 3)), FakeClock())


@pytest_asyncio.fixture
async def client(control: FakeControl) -> AsyncIterator[AdminClient]:
    async with admin_api(control, FakeClock()) as found:
        yield found


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": TOKEN.decode()},
        {"Authorization": f"Basic {TOKEN.decode()}"},
        {"Authorization": f"Bearer {TOKEN.decode()[:-1]}"},
        {"Authorization": f"Bearer {TOKEN.decode()}x"},
        {"Authorization": f"Bearer {TOKEN.decode().upper()}"},
        {"Authorization": "Bearer \u00e9" + "x" * 63},
        {"X-Api-Key": TOKEN.decode()},
        {"Cookie": f"token={TOKEN.decode()}"},
        {"X-Starfish-Forwarded-For": "127.0.0.1"},
    ],
)
async def test_without_the_token_nothing_is_told_and_nothing_changed(
    client: AdminClient, control: FakeControl, headers: dict[str, str]
) -> None:
    for method, path in (
        ("GET", "/v1/status"),
        ("GET", "/v1/fault_tolerance/status"),
        ("GET", "/is_scaling_elastic_ep"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("GET", "//"),
        ("GET", "/page.html"),
        ("POST", "/"),
        ("POST", "/v1/drain"),
        ("POST", "/v1/pause"),
        ("POST", "/scale_elastic_ep"),
        ("POST", "/v1/fault_tolerance/apply"),
        ("PUT", "/v1/drain"),
    ):
        answer = await client.ask(method, path, {"rank": 1}, headers=headers)
        assert (answer.status, answer.body["error"]["code"]) == (401, "no_token"), path
        assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
        assert set(answer.body) == {"error"}
    assert control.state.desired == DesiredState()


async def test_the_page_for_people_is_the_same_for_everybody_and_has_nothing_of_the_instance(
    client: AdminClient, control: FakeControl
) -> None:
    texts = []
    for headers in ({}, HEADERS, {"Authorization": "Bearer wrong"}):
        async with client.http.get(client.url + "/?token=x", headers=headers) as response:
            texts.append((response.status, await response.text(), dict(response.headers)))
        control.leave_map(len(texts))
    for _, _, found in texts:
        found.pop("Date")
    assert texts[0][0] == 200
    assert texts[0] == texts[1] == texts[2]
    told = str(texts[0])
    assert not [secret for secret in (*SECRETS, client.url) if secret in told]


async def test_another_site_may_not_show_the_page_or_read_the_api(client: AdminClient) -> None:
    origin = {**HEADERS, "Origin": "http://elsewhere.test"}
    for path in ("/", "/v1/status"):
        async with client.http.get(client.url + path, headers=origin) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
    preflight = {
        "Origin": "http://elsewhere.test",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    assert (await client.ask("OPTIONS", "/v1/drain", headers=preflight)).status == 401
    async with client.http.get(client.url + "/") as response:
        assert response.headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]


async def test_a_token_in_the_address_is_none(client: AdminClient) -> None:
    path = f"/v1/status?token={TOKEN.decode()}&access_token={TOKEN.decode()}"
    assert (await client.ask("GET", path, headers={})).status == 401


async def test_a_body_is_not_read_before_the_token_is_right(client: AdminClient) -> None:
    """What a stranger sends takes no memory: the answer comes before the body."""
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n{")
    async with asyncio.timeout(30):  # less than it waits for a body
        assert b" 401 " in await reader.readline()
    writer.close()


async def test_the_token_is_in_no_answer_no_log_and_no_record(
    client: AdminClient, control: FakeControl
) -> None:
    text = io.StringIO()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(text))
    try:
        answers = [
            await client.get("/v1/status"),
            await client.post("/v1/drain", {"rank": 1}),
            await client.post("/v1/drain", {"rank": 99}),
            await client.post("/v1/drain", b"{"),
            await client.ask("GET", "/v1/status", headers={"Authorization": "Bearer wrong"}),
            await client.get("/v1/" + "x" * 3000),
        ]
    finally:
        structlog.reset_defaults()
    assert "admin_accepted" in text.getvalue()
    leader = LeaderRecord(control_plane="a", pid=1, term=1, since=0.0, admin_url=client.url)
    told = [
        text.getvalue(),
        str(answers),
        str(pack_record(leader) + pack_record(control.state.desired)),
    ]
    assert not [part for part in told for secret in SECRETS if secret in part]


async def ends(url: str, sent: bytes = b"") -> bytes:
    """What comes until the other side ends the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


PATIENT = replace(LIMITS, connections_max=4, per_address_max=4, header_timeout_s=3600.0)


async def test_who_connects_and_says_nothing_is_soon_gone(control: FakeControl) -> None:
    hurried = replace(LIMITS, header_timeout_s=0.2)
    async with admin_api(control, FakeClock(), limits=hurried) as client:
        assert await ends(client.url) == b""
        assert await ends(client.url, b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX-Drop: ") == b""
        assert (await client.get("/v1/status")).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX-Drop: ",
        b"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n{",
    ],
)
async def test_strangers_who_stay_are_few_and_keep_nobody_out(
    control: FakeControl, sent: bytes
) -> None:
    async with admin_api(control, FakeClock(), limits=PATIENT) as client:
        host, port = client.url.removeprefix("http://").split(":")
        strangers = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        for _, writer in strangers:
            writer.write(sent)
        for reader, _ in strangers[:16]:
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(30):
                    assert b"401" in (await reader.read() or b"401")
        assert (await client.get("/v1/status")).status == 200
        for _, writer in strangers:
            writer.close()


async def test_a_connection_is_for_one_request(client: AdminClient) -> None:
    answer = await client.get("/v1/status")
    assert answer.headers["Connection"].lower() == "close"


def config(**fields: object) -> ControlPlaneConfig:
    return ControlPlaneConfig(
        model=Path("m"),
        store=EtcdOptions(etcd="e:1"),
        admin_port=0,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_there_is_no_admin_api_without_a_token_on_any_address(host: str) -> None:
    with pytest.raises(ConfigError, match="--admin-token-file"):
        config(admin_host=host).check()
    assert open_admin_api(config(admin_host=host)) is None


def test_it_listens_on_this_host_alone_unless_somebody_asks_for_more(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN)
    file.chmod(0o600)
    opened = open_admin_api(config(admin_token_file=file))
    assert opened is not None
    for listener in opened.listeners:
        assert listener.getsockname()[0] == "127.0.0.1"
        listener.close()
    assert opened.url == f"http://127.0.0.1:{opened.url.rsplit(':', 1)[1]}"
    wide = open_admin_api(config(admin_token_file=file, admin_host="0.0.0.0"))
    assert wide is not None
    wide.listeners[0].close()
    assert wide.url.startswith(f"http://{socket.gethostname()}:")


def test_a_token_file_that_others_read_or_that_is_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_admin_token(file)
    file.chmod(0o600)
    assert read_admin_token(file) == TOKEN
    file.write_bytes(b"short")
    with pytest.raises(ConfigError, match="at least 32"):
        read_admin_token(file)


def test_up_makes_a_token_of_its_own_for_each_run_which_no_argument_shows(tmp_path: Path) -> None:
    tokens = []
    for _ in range(2):
        folder = RunFolder(tmp_path / "run", is_default=True)
        file = tmp_path / "run" / "admin-token"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        tokens.append(read_admin_token(file))
        folder.remove_files(keep_logs=False)
        assert not file.exists()
    assert tokens[0] != tokens[1]
    options = UpOptions(chosen_run_dir=tmp_path / "run")
    service = control_plane(options, EtcdOptions(etcd="e:1"), Path("m"), 0, 7)
    command = " ".join([*service.command(3), *service.environment.values()])
    assert str(file) in command
    assert tokens[1].decode() not in command
    assert HEADERS["Authorization"] not in command


@pytest.mark.parametrize("sent", [b"", b"no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_nothing_stays_of_connections_that_have_ended(
    control: FakeControl, sent: bytes
) -> None:
    """Not for as long either as a silent one may last."""

    def num_kept() -> int:
        gc.collect()
        return sum(type(each) is web.RequestHandler for each in gc.get_objects())

    async with admin_api(control, FakeClock(), limits=PATIENT) as client:
        before, port = num_kept(), int(client.url.rpartition(":")[2])
        for _ in range(50):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        async with asyncio.timeout(60):
            while num_kept() > before + 5:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
