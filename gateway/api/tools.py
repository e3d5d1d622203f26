"""Reads which tools a chat may or must call."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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
    parameters of the tools that may be called. If nothing keeps the model from calling others, the
    template does not show them. `calls_max` limits the calls of an answer; None: the model
    decides."""

    mode: ToolMode
    tools: tuple[Mapping[str, Any], ...]
    schemas: Mapping[str, Mapping[str, Any]]
    calls_max: int | None


NO_TOOLS = ToolRequest(mode=ToolMode.NONE, tools=(), schemas={}, calls_max=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """`allowed` may be called. `is_named`: by the client, so that one call is meant."""

    mode: ToolMode
    allowed: Collection[str] = ()
    is_named: bool = False


def read_tools(body: ChatBody) -> ToolRequest:
    """Raises RequestError."""
    schemas = _schemas(body.tools)
    choice = _choice(body.tool_choice, schemas)
    if choice.mode is ToolMode.NONE:
        return NO_TOOLS
    tools = body.tools or ()
    if choice.mode is ToolMode.AUTO:
        tools = [tool for tool in tools if tool["function"]["name"] in choice.allowed]
    return ToolRequest(
        mode=choice.mode,
        tools=tuple(tools),
        schemas={name: schema for name, schema in schemas.items() if name in choice.allowed},
        calls_max=_calls_max(choice, body.parallel_tool_calls),
    )


def _calls_max(choice: _Choice, parallel: bool | None) -> int | None:
    """A model that must call goes on calling as long as it may, if it is weak: so several calls are
    for those who ask for them."""
    if choice.mode is ToolMode.AUTO:
        return 1 if parallel is False else None
    return CALLS_MAX if parallel and not choice.is_named else 1


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


def _choice(choice: Any, schemas: Mapping[str, Any]) -> _Choice:
    if choice is None or choice == "auto":
        return _Choice(mode=ToolMode.AUTO if schemas else ToolMode.NONE, allowed=schemas)
    if choice == "none":
        return _Choice(mode=ToolMode.NONE)
    if not schemas:
        raise _refusal("tool_choice", "it needs tools; pass them as `tools`, or leave it out")
    if choice == "required":
        return _Choice(mode=ToolMode.REQUIRED, allowed=schemas)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), schemas)
    named = _named(choice, schemas)
    return _Choice(mode=ToolMode.REQUIRED, allowed=(named,), is_named=True)


def _named(choice: Any, schemas: Mapping[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise _refusal(
            "tool_choice",
            "pass 'auto', 'none', 'required', "
            '{"type": "function", "function": {"name": …}} or {"type": "allowed_tools", …}',
        )
    if name not in schemas:
        raise _refusal("tool_choice", f"there is no tool {name!r:.140} among `tools`")
    return name


def _allowed(choice: Any, schemas: Mapping[str, Any]) -> _Choice:
    """`auto` or `required`, among some of the tools."""
    modes = {mode.value: mode for mode in (ToolMode.AUTO, ToolMode.REQUIRED)}
    fields = choice if isinstance(choice, dict) else {}
    mode, tools = fields.get("mode"), fields.get("tools")
    if not isinstance(mode, str) or mode not in modes or not isinstance(tools, list) or not tools:
        raise _refusal(
            "tool_choice",
            "allowed_tools is an object with the mode 'auto' or 'required' and with tools, a list "
            'of {"type": "function", "function": {"name": …}}',
        )
    return _Choice(mode=modes[mode], allowed={_named(tool, schemas) for tool in tools})


def _refusal(param: str, reason: str) -> RequestError:
    return RequestError(f"{param}: {reason}", param=param)
