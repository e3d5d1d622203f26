"""`tools`, `tool_choice` and `parallel_tool_calls`: what they mean, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.bodies import ChatBody, decode_body
from gateway.api.tools import CALLS_MAX, NO_TOOLS, ToolMode, ToolRequest, read_tools
from shared.errors import RequestError

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}


def tool(name: str, parameters: Any = CITY, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}, **more}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: Any, *names: str) -> dict[str, Any]:
    fields = {"mode": mode, "tools": [named(name) for name in names]}
    return {"type": "allowed_tools", "allowed_tools": fields}


def read(**fields: Any) -> ToolRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return read_tools(decode_body(json.dumps(body).encode(), ChatBody))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": []},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True},
        {"tool_choice": "none"},
        {"tools": [tool("a")], "tool_choice": "none"},
    ],
)
def test_no_tools(fields: dict[str, Any]) -> None:
    assert read(**fields) == NO_TOOLS


@pytest.mark.parametrize(
    ("fields", "mode", "callable_tools", "calls_max"),
    [
        ({}, ToolMode.AUTO, {"a", "b"}, None),
        ({"tool_choice": "auto"}, ToolMode.AUTO, {"a", "b"}, None),
        ({"parallel_tool_calls": False}, ToolMode.AUTO, {"a", "b"}, 1),
        ({"tool_choice": "required"}, ToolMode.REQUIRED, {"a", "b"}, 1),
        (
            {"tool_choice": "required", "parallel_tool_calls": True},
            ToolMode.REQUIRED,
            {"a", "b"},
            CALLS_MAX,
        ),
        ({"tool_choice": named("b")}, ToolMode.REQUIRED, {"b"}, 1),
        (
            {"tool_choice": named("b"), "parallel_tool_calls": True},
            ToolMode.REQUIRED,
            {"b"},
            1,
        ),
    ],
)
def test_choices(
    fields: dict[str, Any], mode: ToolMode, callable_tools: set[str], calls_max: int | None
) -> None:
    tools = [tool("a"), tool("b", None)]
    request = read(tools=tools, **fields)
    assert (request.mode, set(request.schemas), request.calls_max) == (
        mode,
        callable_tools,
        calls_max,
    )
    assert list(request.tools) == tools


@pytest.mark.parametrize(
    ("choice", "more", "mode", "callable_tools", "shown", "calls_max"),
    [
        (allowed("auto", "a", "c"), {}, ToolMode.AUTO, {"a", "c"}, ["a", "c"], None),
        (allowed("auto", "b"), {"parallel_tool_calls": False}, ToolMode.AUTO, {"b"}, ["b"], 1),
        (allowed("required", "c", "a"), {}, ToolMode.REQUIRED, {"a", "c"}, ["a", "b", "c"], 1),
        (
            allowed("required", "b"),
            {"parallel_tool_calls": True},
            ToolMode.REQUIRED,
            {"b"},
            ["a", "b", "c"],
            CALLS_MAX,
        ),
    ],
)
def test_some_of_the_tools_are_allowed(
    choice: dict[str, Any],
    more: dict[str, Any],
    mode: ToolMode,
    callable_tools: set[str],
    shown: list[str],
    calls_max: int | None,
) -> None:
    """A grammar keeps a forced call to them; a model that may choose sees no others."""
    request = read(tools=[tool("a"), tool("b"), tool("c")], tool_choice=choice, **more)
    assert (request.mode, set(request.schemas)) == (mode, callable_tools)
    assert [each["function"]["name"] for each in request.tools] == shown
    assert request.calls_max == calls_max


def test_parameters_are_schemas_of_objects() -> None:
    request = read(tools=[tool("a", None), tool("b", {}), tool("c", {"properties": {}}), tool("d")])
    assert all(schema["type"] == "object" for schema in request.schemas.values())
    assert request.schemas["d"] == CITY


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": ["a"]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [tool("a", type="custom")]}, "tools"),
        ({"tools": [tool("")]}, "tools"),
        ({"tools": [tool("a b")]}, "tools"),
        ({"tools": [tool('a", "x": "')]}, "tools"),
        ({"tools": [tool("a"), tool("a")]}, "tools"),
        ({"tools": [tool("a", "text")]}, "tools"),
        ({"tools": [tool("a", {"type": "string"})]}, "tools"),
        ({"tools": [tool(f"a{n}") for n in range(300)]}, "tools"),
        ({"tools": "all"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": named("a")}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": named("b")}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": {**named("a"), "type": "custom"}}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": {"name": "a"}}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": ["a"]}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": allowed("auto", "b")}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": allowed("none", "a")}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": allowed("required")}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": allowed(["auto"], "a")}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": allowed("auto", "a")}, "tool_choice"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**fields)
    assert caught.value.param == param
