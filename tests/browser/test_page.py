"""What a person sees and can do on the page, in a real browser against a real admin API."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web

from shared.records import GatewayRecord, Verdict
from shared.types import Epoch, SuspicionReason
from tests.browser.conftest import CHROMIUM, log_in, opened
from tests.support.admin_api import AdminClient, FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.admin.test_live_figures import gateway, metrics, rank_process
from tests.unit.control_plane.desired import agent, member, state_of

pytest.importorskip("playwright", reason="no Playwright here; `make test-page` installs it")

from playwright.async_api import expect

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here; `make test-page` installs it and runs this"
    ),
]

CONTRAST = """() => {
  const parts = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((n) => {
    const c = n / 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  const light = (text) => { const [r, g, b] = parts(text);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const backOf = (e) => { for (; e; e = e.parentElement) {
      const found = getComputedStyle(e).backgroundColor;
      if (!found.endsWith(", 0)")) return found; } return "rgb(255, 255, 255)"; };
  return [...document.querySelectorAll("p, dt, dd, h1, h2, h3, h4, span, button, label, time")]
    .filter((e) => e.checkVisibility() && e.textContent.trim() && !e.disabled)
    .map((e) => { const pair = [light(getComputedStyle(e).color), light(backOf(e))];
      return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), e.textContent]; })
    .filter(([ratio]) => ratio < 4.5);
}"""


class Gateway:
    """Counts 40 tokens more with each question, two of them after a gap of up to 100 ms."""

    def __init__(self) -> None:
        self.asked = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        number = 40 * self.asked
        gaps = {"0.02": 0, "0.05": 38 * self.asked, "0.1": number, "+Inf": number}
        return web.Response(text=metrics({"0": number}, gaps))


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(state_of(agent("host-a", 0, 1), agent("host-b", 2, 3)), FakeClock())


@pytest_asyncio.fixture
async def records() -> AsyncIterator[list[GatewayRecord]]:
    app = web.Application()
    app.router.add_get("/metrics", Gateway().answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield [gateway("g0", runner.addresses[0][1])]
    await runner.cleanup()


@pytest_asyncio.fixture
async def client(control: FakeControl, records: list[GatewayRecord]) -> AsyncIterator[AdminClient]:
    async with admin_api(control, FakeClock(), records, can_kill=True) as found:
        yield found


async def test_it_shows_the_instance_to_who_has_the_token(client: AdminClient) -> None:
    async with opened(client.url) as page:
        await log_in(page, b"0" * 64)
        await expect(page.locator("#notice")).to_contain_text("token")
        await expect(page.locator("#instance")).to_be_hidden()
        await log_in(page)
        await expect(page.locator("#serving")).to_have_text("4 of 4")
        await expect(page.get_by_role("region", name="host host-b")).to_contain_text("Rank 3")
        await expect(page.locator("#survives-counts")).to_contain_text("Without a reload")
        await page.get_by_role("button", name="Forget the token").click()
        await expect(page.locator("#instance")).to_be_hidden()


async def test_what_clients_get_moves(client: AdminClient) -> None:
    async with opened(client.url) as page:
        await log_in(page)
        await expect(page.locator("#flow-text")).to_contain_text("tokens/s")
        await expect(page.locator("#flow-text")).to_contain_text("up to 100 ms")
        drawn = "() => { const c = document.getElementById('flow'); return [...c.getContext('2d')"
        drawn += ".getImageData(0, 0, c.width, c.height).data].some((value) => value > 0); }"
        assert await page.evaluate(drawn)


async def test_experts_are_reached_by_keys_and_hot_ones_are_darker(
    client: AdminClient, control: FakeControl
) -> None:
    expert_map = control.state.expert_map
    assert expert_map is not None
    loads = np.ones((expert_map.num_layers, expert_map.num_experts))
    loads[0, 1] = 9.0
    control.loads_LE = loads
    async with opened(client.url) as page:
        await log_in(page)
        await expect(page.locator("#heat-text")).to_contain_text("Layer 0, expert 0")
        await page.locator("#heat").focus()
        await page.keyboard.press("ArrowRight")
        ranks = sorted({int(r) for r in np.nonzero(expert_map.placement[0] == 1)[0]})
        await expect(page.locator("#heat-text")).to_contain_text("Layer 0, expert 1: load ")
        await expect(page.locator("#heat-text")).to_contain_text(", ".join(map(str, ranks)))
        await page.keyboard.press("ArrowDown")
        await expect(page.locator("#heat-text")).to_contain_text("Layer 1, expert 1")
        alpha = """([expert, experts, layers]) => { const c = document.getElementById("heat");
          return c.getContext("2d").getImageData(
            c.width / experts * (expert + 0.5), c.height / layers / 2, 1, 1).data[3]; }"""
        sizes = [expert_map.num_experts, expert_map.num_layers]
        hot, usual = [await page.evaluate(alpha, [expert, *sizes]) for expert in (1, 2)]
        assert hot > 2 * usual > 0
        await page.get_by_label("Show").select_option("replicas")
        await expect(page.locator("#heat-legend")).to_contain_text("replica")


async def test_a_rank_is_drained_by_keyboard_alone(
    client: AdminClient, control: FakeControl
) -> None:
    async with opened(client.url) as page:
        await log_in(page)
        button = page.get_by_role("button", name="Drain rank 2", exact=True)
        for _ in range(60):
            await page.keyboard.press("Tab")
            if await button.evaluate("(found) => found === document.activeElement"):
                break
        await page.keyboard.press("Enter")
        await page.get_by_label("Sessions may finish").fill("7")
        await page.keyboard.press("Enter")
        await expect(page.locator("#notice")).to_have_text("Drain rank 2: accepted.")
        (drain,) = control.state.desired.drains
        assert (drain.rank, drain.grace_s) == (2, 7.0)
        undrain = page.get_by_role("button", name="Undrain rank 2", exact=True)
        await undrain.click()
        await page.keyboard.press("Escape")
        await asyncio.sleep(0)
        assert control.state.desired.drains != ()


async def test_a_rank_is_killed_after_a_question(client: AdminClient, control: FakeControl) -> None:
    async with rank_process(1, 1) as process:
        record = replace(control.state.records[member(1)], pid=process.pid)
        control.state = replace(control.state, records={**control.state.records, member(1): record})
        async with opened(client.url) as page:
            await log_in(page)
            await page.get_by_role("button", name="Kill rank 1", exact=True).click()
            await expect(page.locator("#question")).to_contain_text("Kill rank 1, incarnation 1")
            assert process.returncode is None
            await page.get_by_role("button", name="Do it").click()
            await expect(page.locator("#notice")).to_contain_text(f"pid {process.pid}")
        assert await process.wait() == -signal.SIGKILL


async def test_nobody_is_offered_a_kill_that_is_not_allowed(control: FakeControl) -> None:
    async with admin_api(control, FakeClock()) as client, opened(client.url) as page:
        await log_in(page)
        await expect(page.get_by_role("button", name="Drain rank 1", exact=True)).to_be_visible()
        await expect(page.get_by_role("button", name="Kill rank 1", exact=True)).to_be_hidden()


async def test_the_timeline_tells_of_a_death(client: AdminClient, control: FakeControl) -> None:
    async with opened(client.url) as page:
        await log_in(page)
        await expect(page.locator("#events")).to_contain_text("epoch 1")
        control.leave_map(3)
        verdict = Verdict(
            rank=member(3).rank,
            incarnation=member(3).incarnation,
            cause=SuspicionReason.EXIT,
            signals=(),
            epoch=Epoch(2),
            first_signal_at=10.0,
            decided_at=10.012,
        )
        control.state = replace(control.state, verdicts={verdict.member: verdict})
        await expect(page.locator("#events")).to_contain_text("verdict on rank 3")
        await expect(page.locator("#events")).to_contain_text("epoch 2")
        await expect(page.locator("#serving")).to_have_text("3 of 4")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
async def test_it_can_be_read_and_fits(client: AdminClient, width: int, dark: bool) -> None:
    async with opened(client.url, width=width, dark=dark) as page:
        await log_in(page)
        await expect(page.locator("#heat-text")).to_contain_text("Layer 0")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        assert await page.evaluate(CONTRAST) == []
        back = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(back[4:].split(",")[0]) < 128) == dark
