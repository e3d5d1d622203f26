"""Reads which tools a chat may or must call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gateway.api.bodies import ChatBody
from shared.errors import RequestError

TOOLS_MAX = 256
CALLS_MAX = 16
"""Limit on the calls of an answer that must call tools."""

_NAME = re.compile(r"[\w.\-]{1,128}")
_NO_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


class ToolMode(Enum):
    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"  # one tool at least, or the one that is named


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRequest:
    """`tools` as the client sent them, for the chat template; empty in mode NONE. `schemas` are the
    parameters of the tools that may be called. `calls_max` limits the calls of an answer; None: the
    model decides."""

    mode: ToolMode
    tools: tuple[Mapping[str, Any], ...]
    schemas: Mapping[str, Mapping[str, Any]]
    calls_max: int | None


NO_TOOLS = ToolRequest(mode=ToolMode.NONE, tools=(), schemas={}, calls_max=None)


def read_tools(body: ChatBody) -> ToolRequest:
    """Raises RequestError."""
    schemas = _schemas(body.tools)
    mode, named = _choice(body.tool_choice, schemas)
    if mode is ToolMode.NONE:
        return NO_TOOLS
    return ToolRequest(
        mode=mode,
        tools=tuple(body.tools or ()),
        schemas={named: schemas[named]} if named is not None else schemas,
        calls_max=_calls_max(mode, named, body.parallel_tool_calls),
    )


def _calls_max(mode: ToolMode, named: str | None, parallel: bool | None) -> int | None:
    """A model that must call goes on calling as long as it may, if it is weak: so several calls are
    for those who ask for them."""
    if mode is ToolMode.AUTO:
        return 1 if parallel is False else None
    return CALLS_MAX if parallel and named is None else 1


def _schemas(tools: list[Any] | None) -> dict[str, Mapping[str, Any]]:
    if tools is not None and len(tools) > TOOLS_MAX:
        raise _refusal("tools", f"at most {TOOLS_MAX} are supported")
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools or ()):
        name, schema = _function(index, tool)
        if name in schemas:
            raise _refusal("tools", f"two tools have the name {name}")
        schemas[name] = schema
    return schemas


def _function(index: int, tool: Any) -> tuple[str, Mapping[str, Any]]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise _refusal("tools", f"tool {index} must be an object with type 'function' and function")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refusal(
            "tools",
            f"the name of tool {index} must have 1 to 128 letters, digits, dots, underscores and "
            "hyphens",
        )
    if parameters is None or parameters == {}:
        return name, _NO_PARAMETERS
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise _refusal("tools", f"the parameters of {name} must be a JSON schema of an object")
    return name, {"type": "object", **parameters}


def _choice(choice: Any, schemas: Mapping[str, Any]) -> tuple[ToolMode, str | None]:
    """The mode and, if one tool must be called, its name."""
    if choice is None or choice == "auto":
        return (ToolMode.AUTO if schemas else ToolMode.NONE), None
    if choice == "none":
        return ToolMode.NONE, None
    if not schemas:
        raise _refusal("tool_choice", "it needs tools; pass them as `tools`, or leave it out")
    if choice == "required":
        return ToolMode.REQUIRED, None
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise _refusal(
            "tool_choice",
            "pass 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": …}}',
        )
    if name not in schemas:
        raise _refusal("tool_choice", f"there is no tool {name!r:.140} among `tools`")
    return ToolMode.REQUIRED, name


def _refusal(param: str, reason: str) -> RequestError:
    return RequestError(f"{param}: {reason}", param=param)
