"""Writes `docs/reference/*.md` from the code: flags, environment and TOML; metrics; log events;
etcd keys; fields of requests. `--check` writes nothing and fails if a page is not current."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from cli.__main__ import app
from control_plane.config import ControlPlaneConfig
from control_plane.telemetry import Metrics
from gateway.api.ignored_fields import IGNORED_FIELDS_HEADER
from gateway.api.request_fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    STREAM_OPTIONS,
    RequestField,
)
from gateway.config import GatewayConfig
from gateway.metrics import GatewayMetrics, TotalHistogram
from gpu_worker.config import RankConfig
from node_agent.config import AgentConfig
from node_agent.metrics import AgentMetrics
from shared.config import Timings
from shared.handshake import Access
from shared.keys import Keys
from shared.types import Accuser, Incarnation, NodeId, RankId

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
NOTICE = "<!-- Written by `python -m docs.generate` from the code. Do not edit. -->"
SERVICES: tuple[tuple[str, str, type[Any]], ...] = (
    ("gateway", "starfish gateway", GatewayConfig),
    ("control_plane", "starfish control-plane", ControlPlaneConfig),
    ("agent", "starfish agent", AgentConfig),
    ("rank", "python -m gpu_worker", RankConfig),
)
LOGGING_PACKAGES = ("gateway", "control_plane", "node_agent", "gpu_worker", "shared", "cli")
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
GATEWAY_PREFIX = "starfish_gateway_"


def main() -> int:
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in pages().items() if read(REFERENCE / name) != text]
        for name in stale:
            print(f"docs/reference/{name} is not current; run: python -m docs.generate")
        return 1 if stale else 0
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)
    return 0


def pages() -> dict[str, str]:
    """The text of every page of the reference."""
    return {
        "configuration.md": configuration_page(),
        "command.md": command_page(),
        "metrics.md": metrics_page(),
        "log_events.md": log_events_page(),
        "etcd_keys.md": etcd_keys_page(),
        "request_fields.md": request_fields_page(),
    }


def read(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


# Flags, environment, TOML.


def configuration_page() -> str:
    lines = [
        "# Configuration of the services",
        "",
        NOTICE,
        "",
        "Every service reads its options from three places. A later one wins: its table of the",
        "TOML file that `--config FILE` names, then the environment, then flags. An unknown key or",
        "an impossible value stops the process with one sentence.",
        "",
        "The name of an option gives all three spellings. Take the port of a gateway:",
        "",
        "| TOML | environment | flag |",
        "|---|---|---|",
        "| `port = 8080` under `[gateway]` | `STARFISH_GATEWAY_PORT=8080` | `--port 8080` |",
        "",
        "In a flag, `-` takes the place of `_`. A boolean option is `--name` or `--no-name`.",
    ]
    for section, command, config in SERVICES:
        lines += ["", f"## {section}", "", f"`{command}`, TOML table `[{section}]`,"]
        lines += [f"environment `STARFISH_{section.upper()}_…`.", ""]
        lines += table(("option", "type", "default", "meaning"), option_rows(config))
    lines += ["", "## Rules between options", ""]
    lines += [f"{text}" for text in wrapped(inspect.getdoc(Timings) or "")]
    return page(lines)


def option_rows(config: type[Any]) -> Iterator[tuple[str, ...]]:
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from option_rows(typing.cast(type[Any], hint))
            continue
        yield f"`{item.name}`", type_text(hint), default_text(item.default), help_of(item)


def help_of(item: dataclasses.Field[Any]) -> str:
    return str(item.metadata.get("help", ""))


def type_text(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    names = [kind.__name__ for kind in typing.get_args(hint) if kind is not type(None)]
    return str((names or [getattr(hint, "__name__", str(hint))])[0]).lower()


def default_text(value: object) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, Enum):
        return f"`{value.value}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def command_page() -> str:
    lines = [
        "# The `starfish` command",
        "",
        NOTICE,
        "",
        "`starfish COMMAND --help` shows the same.",
    ]
    for name, command in commands("starfish", typer.main.get_command(app)):
        lines += ["", f"## {name}", "", *wrapped(inspect.cleandoc(command.help or ""))]
        rows = [row for parameter in command.params for row in parameter_rows(parameter)]
        if rows:
            lines += ["", *table(("option", "default", "meaning"), rows)]
    return page(lines)


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its words."""
    children = getattr(command, "commands", None)
    if not children:
        yield name, command
        return
    for child in sorted(children):
        yield from commands(f"{name} {child}", children[child])


def parameter_rows(parameter: Any) -> Iterator[tuple[str, ...]]:
    if parameter.name == "help":
        return
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    is_unset = default is None or default is False or default == [] or callable(default)
    shown = "" if is_unset else default_text(default)
    yield names, shown, parameter.help or ""


# Metrics.


def metrics_page() -> str:
    lines = [
        "# Metrics",
        "",
        NOTICE,
        "",
        "Prometheus reads them at `/metrics`: of a gateway on its port, of a control plane on",
        "`--port`, of a node agent on `--metrics-port` (both off by default). Ranks have no",
        "endpoint: their node agent tells what they answer. A counter's name ends in `_total`, a",
        "histogram has `_bucket`, `_sum` and `_count`. [Monitoring](../monitoring.md) says how to",
        "use them.",
    ]
    header = ("name", "kind", "labels", "meaning")
    lines += ["", "## gateway", ""]
    gateway = GatewayMetrics()
    lines += table(header, [*metric_rows(gateway), *read_metric_rows()])
    lines += ["", "## gateway, by vLLM's names", ""]
    lines += table(header, map(family_row, gateway.vllm.collect()))
    lines += ["", "## control plane", ""]
    lines += table(header, registry_rows(Metrics().registry))
    agent = AgentMetrics(NodeId("node-a"), "default", Access("default"))
    lines += ["", "## node agent", "", *table(header, registry_rows(agent.registry))]
    return page(lines)


def registry_rows(registry: CollectorRegistry) -> Iterator[tuple[str, ...]]:
    for collector in registry._collector_to_names:
        if isinstance(collector, Counter | Gauge | Histogram):
            yield declared_row(collector)
        else:
            yield from map(family_row, collector.collect())


def metric_rows(owner: object) -> Iterator[tuple[str, ...]]:
    for metric in vars(owner).values():
        if isinstance(metric, Counter | Gauge | Histogram | TotalHistogram):
            yield declared_row(metric)


def declared_row(metric: Counter | Gauge | Histogram | TotalHistogram) -> tuple[str, ...]:
    """Of a metric that may have no series yet."""
    family = next(iter(metric.describe()))
    name = family.name + ("_total" if isinstance(metric, Counter) else "")
    labels = ", ".join(f"`{label}`" for label in getattr(metric, "_labelnames", ()))
    return f"`{name}`", family.type, labels, family.documentation


def family_row(family: Metric) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
    name = family.name + ("_total" if family.type == "counter" else "")
    return f"`{name}`", family.type, labels, family.documentation


READ_METRICS = {"add_gauge": ("gauge", ""), "add_counter": ("counter", "_total")}


def read_metric_rows() -> Iterator[tuple[str, ...]]:
    """Metrics that read something when they are asked: found where they are added."""
    for file in source_files("gateway"):
        for call in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in READ_METRICS
            ):
                kind, suffix = READ_METRICS[call.func.attr]
                name, text = (ast.literal_eval(argument) for argument in call.args[:2])
                labels = ", ".join(f"`{word.arg}`" for word in call.keywords)
                yield f"`{GATEWAY_PREFIX}{name}{suffix}`", kind, labels, text


# Log events.


def log_events_page() -> str:
    lines = [
        "# Log events",
        "",
        NOTICE,
        "",
        "Services log events with fields to stderr, one line each; `--log-json` makes a JSON",
        "object of every line. Each line has `service` too, of a rank also `rank`, of a node agent",
        "`node`. The level `exception` is an error with a traceback. `…` stands for fields that",
        "the code gathers elsewhere.",
    ]
    for package in LOGGING_PACKAGES:
        rows = sorted(set(event_rows(package)))
        if rows:
            header = ("event", "level", "fields", "logged in")
            lines += ["", f"## {package}", "", *table(header, rows)]
    return page(lines)


def event_rows(package: str) -> Iterator[tuple[str, ...]]:
    for file in source_files(package):
        tree = ast.parse(file.read_text())
        aliases = dict(level_aliases(tree))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            level = level_of(call.func)
            if isinstance(call.func, ast.Name):
                level = aliases.get(call.func.id)
            if level is not None:
                event = ast.literal_eval(call.args[0])
                fields = [f"`{word.arg}`" if word.arg else "…" for word in call.keywords]
                yield f"`{event}`", level, ", ".join(fields), f"`{file.relative_to(ROOT)}`"


def level_of(function: ast.expr) -> str | None:
    """`info` of `log.info`."""
    if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
        return None
    is_level = function.value.id == "log" and function.attr in LEVELS
    return function.attr if is_level else None


def level_aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names such as `say` of `say = log.info if … else log.debug`, with their levels."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp):
            levels = [level_of(node.value.body), level_of(node.value.orelse)]
            target = node.targets[0]
            if isinstance(target, ast.Name) and all(levels):
                yield target.id, " or ".join(level for level in levels if level)


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


# etcd.


def etcd_keys_page() -> str:
    lines = [
        "# Keys in etcd",
        "",
        NOTICE,
        "",
        "The keys of the instance `default`, as `shared/keys.py` spells them, for rank 3 in",
        "incarnation 7. Who writes which key, and under which lease, is in",
        "[architecture](../architecture.md#what-is-in-etcd).",
        "",
        *table(("key", "of", "value"), key_rows()),
        "",
        "## Values",
        "",
        "msgpack of these dataclasses of `shared/records.py`, and of `ExpertMap` of",
        "`shared/expert_map.py`.",
    ]
    for file, name in (("shared/records.py", None), ("shared/expert_map.py", "ExpertMap")):
        for record in records(ROOT / file):
            if name in (None, record.name):
                lines += ["", f"### {record.name}", "", *wrapped(ast.get_docstring(record) or "")]
                lines += ["", *table(("field", "type", "meaning"), field_rows(ROOT / file, record))]
    return page(lines)


def key_rows() -> Iterator[tuple[str, ...]]:
    examples: dict[str, object] = {
        "rank": RankId(3),
        "incarnation": Incarnation(7),
        "accuser": Accuser.AGENT,
        "by": "agent:node-a",
        "node": NodeId("node-a"),
        "gateway_id": "gateway-1",
    }
    keys = Keys()
    for name, member in vars(Keys).items():
        if name.startswith("_") or name == "instance":
            continue
        if isinstance(member, property):
            key, documented = getattr(keys, name), inspect.getdoc(member)
        elif inspect.isfunction(member):
            wanted = list(inspect.signature(member).parameters)[1:]
            key, documented = member(keys, *(examples[each] for each in wanted)), member.__doc__
        else:
            continue
        kind = "prefix" if key.endswith("/") else "key"
        yield f"`{key}`", f"{kind} `Keys.{name}`", " ".join((documented or "").split())


def records(file: Path) -> Iterator[ast.ClassDef]:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            yield node


def field_rows(file: Path, record: ast.ClassDef) -> Iterator[tuple[str, ...]]:
    lines = file.read_text().splitlines()
    for node in record.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None
            comment = lines[node.end_lineno - 1].partition("  # ")[2]
            yield f"`{node.target.id}`", f"`{ast.unparse(node.annotation)}`", comment


# Markdown.


# Fields of requests.


def request_fields_page() -> str:
    lines = [
        "# Fields of requests",
        "",
        NOTICE,
        "",
        "What becomes of every field of OpenAI's, vLLM's and SGLang's bodies. A harmless field is",
        "accepted, because it changes nothing in the answer. A refused one is a 400 that names it,",
        "unless it is null or has one of the values in brackets, with which it asks for nothing. A",
        "field that is not in the table has no effect; the answer's header",
        f"`{IGNORED_FIELDS_HEADER}` names it.",
    ]
    for title, fields in (
        ("/v1/chat/completions", CHAT_FIELDS),
        ("/v1/completions", COMPLETION_FIELDS),
        ("stream_options", STREAM_OPTIONS),
    ):
        lines += ["", f"## {title}", ""]
        lines += table(("field", "of", "", "note"), map(request_field_row, fields.values()))
    return page(lines)


def request_field_row(about: RequestField) -> tuple[str, ...]:
    origins = ", ".join(origin.value for origin in about.origins)
    neutral = ", ".join(f"`{json.dumps(value)}`" for value in about.neutral)
    support = about.support.value + (f" ({neutral})" if neutral else "")
    return f"`{about.name}`", origins or "–", support, about.note


def page(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    body = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *body]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def wrapped(text: str, columns: int = 99) -> list[str]:
    """Paragraphs of a docstring, one after the other."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if lines:
            lines.append("")
        line = ""
        for word in paragraph.split():
            if line and len(line) + 1 + len(word) > columns:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(main())
