"""The page for people: what it is made of, and that the API has whatever it reads and asks for."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import control_plane.admin
from shared.desired_state import AfterDrain
from shared.records import Verdict
from shared.types import Epoch, Incarnation, RankId, SuspicionReason
from shared.wire import Load
from tests.support.admin_api import AdminClient, FakeControl, admin_api
from tests.support.fake_clock import FakeClock
from tests.unit.control_plane.desired import agent, member, state_of

PAGE = (Path(control_plane.admin.__file__).parent / "page.html").read_text()
SCRIPT = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)[0]
STYLE = re.findall(r"<style>(.*?)</style>", PAGE, re.DOTALL)[0]
TYPE_OF = {
    "status": "StatusAnswer",
    "past": "StatusAnswer",
    "rank": "RankStatus",
    "pastRank": "RankStatus",
    "load": "LoadStatus",
    "drain": "DrainStatus",
    "survives": "Survival",
    "verdict": "VerdictStatus",
    "step": "Step",
    "clients": "ClientsAnswer",
    "experts": "ExpertsAnswer",
    "killed": "KillAnswer",
}
"""What the script's variables hold."""
INNER = {"leader": "LeaderStatus", "change": "ChangeStatus", "survives": "Survival"}
"""Fields of the status that the script reads through."""


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(state_of(agent("a", 0, 1), agent("b", 2, 3)), FakeClock())


@pytest_asyncio.fixture
async def client(control: FakeControl) -> AsyncIterator[AdminClient]:
    async with admin_api(control, FakeClock()) as found:
        yield found


def test_it_is_one_file_that_names_no_other_place() -> None:
    assert "//" not in re.sub(r"(?m)(^|\s)//\s.*$", "", PAGE)
    assert set(re.findall(r"(?:src|href)=\"([^\"]*)", PAGE)) == {"data:,"}
    assert not re.search(r"@import|url\(|\bimport\b", PAGE)


def test_text_goes_in_as_text() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|srcdoc|\beval\b|Function\(",
        PAGE,
    )
    assert not re.search(r"<[^>]*\s(on\w+|style)=", PAGE)


def test_the_token_is_kept_for_the_tab_alone() -> None:
    assert "sessionStorage" in SCRIPT
    assert not re.search(r"localStorage|indexedDB|document\.cookie|location\.", SCRIPT)


def test_every_field_has_a_label_and_every_id_that_is_used_is_there() -> None:
    ids = re.findall(r"\sid=\"([^\"]+)", PAGE)
    assert len(ids) == len(set(ids))
    used = re.findall(r"\$\(\"([^\"]+)\"\)", SCRIPT)
    for named in re.findall(r"aria-(?:labelledby|describedby)=\"([^\"]+)", PAGE):
        used += named.split()
    assert set(used) - set(ids) == set()
    fields = set(re.findall(r"<(?:input|select) id=\"([^\"]+)", PAGE))
    assert fields
    assert fields - set(re.findall(r"<label for=\"([^\"]+)", PAGE)) == set()


def test_it_has_both_colour_schemes_and_fits_a_phone() -> None:
    assert '<meta name="viewport" content="width=device-width' in PAGE
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    names = [set(re.findall(r"(--\w+):", part)) for part in (light, dark)]
    assert names[0] == names[1] >= set(re.findall(r"var\((--\w+)\)", STYLE))


def test_it_says_what_comes_after_every_kind_of_drain() -> None:
    said = re.findall(r"AFTER_DRAIN = \{(.*?)\}", SCRIPT, re.DOTALL)[0]
    assert set(re.findall(r"(\w+): \"", said)) == {after.value for after in AfterDrain}


def test_it_is_installed_with_the_package() -> None:
    project = tomllib.loads(
        (Path(control_plane.admin.__file__).parents[2] / "pyproject.toml").read_text()
    )
    assert "*.html" in project["tool"]["setuptools"]["package-data"]["*"]


async def test_it_is_served_with_a_policy_that_allows_its_own_code_alone(
    client: AdminClient,
) -> None:
    async with client.http.get(client.url + "/") as response:
        text, headers = await response.text(), response.headers
    assert (response.status, response.content_type, text) == (200, "text/html", PAGE)
    assert (headers["X-Frame-Options"], headers["Cache-Control"]) == ("DENY", "no-store")
    policy = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    for name, content in (("script-src", SCRIPT), ("style-src", STYLE)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"


async def test_a_control_plane_that_does_not_lead_serves_it_too(
    client: AdminClient, control: FakeControl
) -> None:
    control.leads = False
    async with client.http.get(client.url + "/") as response:
        assert response.status == 200


def fields_read() -> Iterable[tuple[str, str]]:
    """Type and field."""
    for name, field in re.findall(r"(?<![\w.])(\w+)\.(\w+)", SCRIPT):
        if name in TYPE_OF:
            yield TYPE_OF[name], field
    for outer, field in re.findall(r"\b(?:status|past)\.(\w+)\.(\w+)", SCRIPT):
        if outer in INNER:
            yield INNER[outer], field


async def test_whatever_it_reads_and_asks_for_is_in_the_api(client: AdminClient) -> None:
    document = (await client.get("/openapi.json")).body
    schemas: dict[str, Any] = document["components"]["schemas"]
    found = set(fields_read())
    assert {kind for kind, _ in found} == {*TYPE_OF.values(), *INNER.values()}
    unknown = [(kind, field) for kind, field in found if field not in schemas[kind]["properties"]]
    assert unknown == []
    asked = set(re.findall(r"\"(/v1/\w+)\"", SCRIPT))
    changes = {"drain", "undrain", "pause", "resume", "rebalance", "scale"}
    shown, demo = {"status", "clients", "experts"}, {"kill"}
    assert asked == {f"/v1/{name}" for name in shown | changes | demo}
    assert asked - set(document["paths"]) == set()
    for path, fields in re.findall(r"change\(\"(/v1/\w+)\", \{([^}]*)\}", SCRIPT):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        properties = schemas[body["schema"]["$ref"].split("/")[-1]]["properties"]
        assert {"request_id", *re.findall(r"\w+", fields)} <= set(properties)


async def test_the_status_has_loads_and_the_newest_verdicts(
    client: AdminClient, control: FakeControl
) -> None:
    control.loads[member(1)] = Load(
        running=3,
        waiting=1,
        tokens=70,
        kv_blocks_free=6,
        kv_blocks=8,
        step_ms=2.5,
        waited_ms=0.5,
    )
    verdicts = [
        Verdict(
            rank=RankId(2),
            incarnation=Incarnation(number),
            cause=SuspicionReason.EXIT,
            signals=(),
            epoch=Epoch(number),
            first_signal_at=10.0,
            decided_at=10.25,
        )
        for number in range(70, 0, -1)
    ]
    control.state = replace(control.state, verdicts={v.member: v for v in verdicts})
    status = (await client.get("/v1/status")).body
    assert status["ranks"][1]["load"] == {
        "running": 3,
        "waiting": 1,
        "tokens": 70,
        "kv_blocks": 8,
        "kv_blocks_free": 6,
        "step_ms": 2.5,
        "waited_ms": 0.5,
    }
    assert status["ranks"][0]["load"] is None
    assert [verdict["epoch"] for verdict in status["verdicts"]] == list(range(7, 71))
    assert status["verdicts"][-1] == {
        "rank": 2,
        "incarnation": 70,
        "cause": "exit",
        "epoch": 70,
        "decided_ms": 250.0,
    }
