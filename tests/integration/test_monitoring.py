"""Dashboards and alerts read metrics that exist, with labels that they have: what all services
export is scraped, and every expression is compared with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from control_plane.telemetry import Metrics
from docs.check import headings
from node_agent.metrics import AgentMetrics
from shared.handshake import Access
from shared.metrics_endpoint import render_metrics
from shared.types import NodeId
from tests.support.gateway_harness import running_gateway
from tests.support.metrics import series_names
from tests.support.promql import label_names, metric_names
from tests.support.tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
ALERT_TESTS = ALERTS.with_name("alerts_test.yml")
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
OF_PROMETHEUS = {"up", "job", "instance", "starfish_instance", "le"}
"""Made by Prometheus, or given to a target by its configuration."""
LATE_LABELS = {"endpoint", "status", "key", "rank", "node", "engine", "forked"}
"""Of series that begin when something happens."""
PLACEHOLDER = re.compile(r"\$__\w+|\$\w+")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a gateway, a control plane and a node agent export, one after the other."""
    model = tmp_path_factory.mktemp("model")
    write_tokenizer(model)
    async with (
        running_gateway(model) as harness,
        harness.http.get(harness.url + "/metrics") as response,
    ):
        texts = [await response.text()]
    agent = AgentMetrics(NodeId("host-a"), "default", Access("default"))
    await agent.update()
    for registry in (Metrics().registry, agent.registry):
        texts.append(render_metrics(registry, "")[0].decode())
    return "".join(texts)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """(where it stands, the expression)"""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for file in DASHBOARDS:
        dashboard = json.loads(file.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield f"{file.name}: {panel['title']}", PLACEHOLDER.sub("5m", target["expr"])
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((\w+), \w+\)", variable["query"]["query"])
                assert found is not None
                yield f"{file.name}: {variable['name']}", found[1]


def test_the_names_and_labels_of_an_expression_are_found() -> None:
    text = 'max by (rank) (rate(a:b{x="y z",k!~"q{"}[5m])) / on (n) c_total and absent(d) > 0.5'
    assert metric_names(text) == {"a:b", "c_total", "d"}
    assert label_names(text) == {"rank", "x", "k", "n"}


async def test_every_expression_reads_what_is_exported(exported: str) -> None:
    names = series_names(exported) | OF_PROMETHEUS
    known = OF_PROMETHEUS | LATE_LABELS
    for family in text_string_to_metric_families(exported):
        for sample in family.samples:
            known |= sample.labels.keys()
    checked = list(expressions())
    assert len(checked) > 80
    wrong = [
        (where, unknown)
        for where, expression in checked
        if (unknown := (metric_names(expression) - names) | (label_names(expression) - known))
        or not metric_names(expression)
    ]
    assert wrong == []


async def test_late_labels_are_labels_of_the_reference() -> None:
    reference = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert {label for label in LATE_LABELS if f"`{label}`" not in reference} == set()


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    for file in DASHBOARDS:
        panels = json.loads(file.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken: set[tuple[int, int]] = set()
        for place in (panel["gridPos"] for panel in panels):
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken
            assert all(x < 24 for x, _ in cells)
            taken |= cells


def test_every_alert_has_a_test_and_a_part_of_the_runbook() -> None:
    anchors = headings((ROOT / "docs" / "runbook.md").read_text())
    tested = {test["name"] for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"]}
    for rule in rules():
        name = rule["alert"]
        assert name in tested
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert name.lower() in anchors
    assert tested == {rule["alert"] for rule in rules()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_alerts_fire_when_they_should() -> None:
    command = ["promtool", "test", "rules", ALERT_TESTS.name]
    result = subprocess.run(command, cwd=ALERTS.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
