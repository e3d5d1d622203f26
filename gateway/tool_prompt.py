"""Tells a model of tools whose chat template does not: in the system message, in the words and with
the tags of Hermes, which most models have seen. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.chat_messages import NO_ARGUMENTS, called_function, parsed_arguments
from gateway.parsers.json_formats import TOOL_CALL, TOOL_CALL_END

Message = Mapping[str, Any]

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}

_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages, with the tools in the system message, and with calls and their results as
    texts. Raises RequestError if a call's arguments are no JSON object."""
    plain = [_as_text(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=lines)
    if plain and plain[0].get("role") == "system":
        first = f"{_text(plain[0].get('content'))}\n\n{introduction}"
        return [{**plain[0], "content": first}, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def _as_text(message: Message) -> Message:
    if message.get("role") == "tool":
        result = _text(message.get("content"))
        return {
            "role": "user",
            "content": f"<tool_response>\n{result}\n</tool_response>",
        }
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not calls:
        return message
    texts = [text] if (text := _text(message.get("content"))) else []
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join([*texts, *map(_call_text, calls)])}


def _call_text(call: Mapping[str, Any]) -> str:
    function = called_function(call)
    name, arguments = function.get("name"), function.get("arguments")
    values = parsed_arguments(arguments)
    if not isinstance(arguments, str) or arguments in NO_ARGUMENTS:
        arguments = json.dumps(values, ensure_ascii=False)
    shown = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'
    return f"{TOOL_CALL}\n{shown}\n{TOOL_CALL_END}"


def _text(content: Any) -> str:
    """`content` as one text: parts are of type `text` here."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) else ""


def with_all_fields(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools for templates that take a function's description and parameters for granted, as
    gpt-oss's does."""
    full: list[dict[str, Any]] = []
    for tool in tools:
        function = tool["function"]
        optional = {
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or dict(NO_PARAMETERS),
        }
        full.append({**tool, "function": {**function, **optional}})
    return full
