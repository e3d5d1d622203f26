"""The admin API over TLS: whom commands believe, and a standby that passes requests on."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from cli.admin.client import AdminClient as CommandClient
from cli.run_dir import Target
from control_plane.admin.admin_app import AdminApp
from control_plane.admin.admin_server import serving
from control_plane.admin.client_figures import ClientFigures
from control_plane.config import ControlPlaneConfig
from shared.clock import SystemClock
from shared.errors import ConfigError
from shared.etcd_certificates import CertificateAuthority
from shared.etcd_options import EtcdOptions
from shared.listener import listen_on
from shared.records import GatewayRecord, LeaderRecord
from shared.server_certificate import ServerCertificate, trusting
from tests.support.admin_api import TOKEN, AdminClient, FakeControl
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.desired import agent, state_of


@pytest.fixture
def authority(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "authority", SystemClock())


def fake(*, leads: bool = True) -> FakeControl:
    control = FakeControl(state_of(agent("a", 0, 1)), FakeClock())
    control.leads = leads
    return control


@asynccontextmanager
async def api(
    control: FakeControl,
    certificate: tuple[Path, Path],
    believed: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Its URL."""
    tls = ServerCertificate(*certificate).context
    listener = listen_on("127.0.0.1", 0)
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    app = AdminApp(
        control,
        token=TOKEN,
        url=url,
        clock=FakeClock(),
        figures=ClientFigures(no_gateways),
        peer_tls=believed,
    )
    async with serving(app, [listener], tls):
        yield url


async def no_gateways() -> list[GatewayRecord]:
    return []


async def asked(url: str, folder: Path, admin_ca: Path | None) -> int:
    """The number of ranks, as a command hears of it."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_bytes(TOKEN)
    target = Target(
        store=EtcdOptions(),
        instance="i",
        admin_url=url,
        admin_token_file=token,
        admin_ca=admin_ca,
    )
    client = CommandClient(target, SystemClock())
    try:
        return len((await client.status()).ranks)
    finally:
        await client.close()


async def test_a_command_believes_the_authority_that_it_is_told(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    other = CertificateAuthority.create(tmp_path / "other", SystemClock())
    async with api(fake(), authority.issue_server(["127.0.0.1"])) as url:
        assert await asked(url, tmp_path, authority.ca_path) == 2
        for wrong in (None, other.ca_path):
            with pytest.raises(ConfigError, match="pass --admin-ca"):
                await asked(url, tmp_path, wrong)


async def test_a_standby_passes_requests_on_to_a_leader_whose_certificate_it_believes(
    authority: CertificateAuthority,
) -> None:
    certificate = authority.issue_server(["127.0.0.1"])
    believed = trusting(authority.ca_path, flag="--admin-ca")
    async with AsyncExitStack() as stack:
        leading = await stack.enter_async_context(api(fake(), certificate))
        leader = LeaderRecord(control_plane="a", pid=1, term=1, since=0.0, admin_url=leading)
        answers = []
        for peer_tls in (believed, None):
            standby = fake(leads=False)
            standby.state = replace(standby.state, leader=leader)
            url = await stack.enter_async_context(api(standby, certificate, peer_tls))
            connector = aiohttp.TCPConnector(ssl=believed)
            http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            answers.append(await AdminClient(url, http).post("/v1/pause", {}))
    assert answers[0].status == 202
    assert answers[1].status == 503
    assert "ClientConnectorCertificateError" in answers[1].message


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"admin_tls_cert": Path("c.pem")}, "--admin-tls-key"),
        ({"admin_tls_cert": Path("c.pem"), "admin_tls_key": Path("k.pem")}, "--admin-port"),
    ],
)
def test_half_of_what_it_needs_is_an_error(options: dict[str, Path], flag: str) -> None:
    config = ControlPlaneConfig(model=Path("m"), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=flag):
        config.check()


def test_its_address_says_that_it_has_tls() -> None:
    config = ControlPlaneConfig(admin_tls_cert=Path("c.pem"), admin_address="host-1")
    assert config.admin_url(9101) == "https://host-1:9101"


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--admin-ca .*nothing\.pem"):
        trusting(tmp_path / "nothing.pem", flag="--admin-ca")
