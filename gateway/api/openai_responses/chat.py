"""A request of the Responses API as the body of `/v1/chat/completions` that asks for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.api.openai_responses.bodies import ResponsesBody
from shared.errors import RequestError

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_KEYS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def chat_fields(body: ResponsesBody, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`earlier` are the messages of the response that this one follows. Raises RequestError."""
    messages: list[Mapping[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    messages += earlier
    messages += input_messages(body.input)
    chat: dict[str, Any] = {
        "messages": messages,
        "model": body.model,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "stop": body.stop,
        "stream": body.stream,
    }
    if body.truncation == "auto":
        chat["truncate_prompt_tokens"] = -1
    chat |= body.answer_fields()
    if body.tools:
        chat["tools"] = [_tool(index, tool) for index, tool in enumerate(body.tools)]
        chat["parallel_tool_calls"] = body.parallel_tool_calls
    if body.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(body.tool_choice)
    if body.reasoning is not None:
        chat["reasoning_effort"] = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        chat["response_format"] = _response_format(body.text.format)
    return {name: value for name, value in chat.items() if value is not None}


def input_messages(given: str | Sequence[Any]) -> list[dict[str, Any]]:
    """The items of an input as messages: reasoning and calls belong to the assistant's turn that
    they stand in. Raises RequestError."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    thoughts: list[str] = []  # whose turn is not known yet
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise _refusal(f"{where} must be an object")
        match item.get("type", "message"):
            case "message":
                message = _message(where, item)
                if message["role"] == "assistant":
                    _think(message, thoughts)
                else:
                    _end_thoughts(messages, thoughts)
                messages.append(message)
            case "reasoning":
                thoughts.append(_reasoning_text(item))
            case "function_call":
                turn = _assistant_turn(messages)
                _think(turn, thoughts)
                turn.setdefault("tool_calls", []).append(_call(where, item))
            case "function_call_output":
                _end_thoughts(messages, thoughts)
                messages.append(_call_output(where, item))
            case kind:
                raise _refusal(
                    f"{where} has type {kind!r:.60}; message, reasoning, function_call, "
                    "function_call_output and item_reference are supported"
                )
    _end_thoughts(messages, thoughts)
    return messages


def _assistant_turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _think(turn: dict[str, Any], thoughts: list[str]) -> None:
    """The thoughts are of this turn, after those that it has."""
    if text := "".join(thoughts):
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text
    thoughts.clear()


def _end_thoughts(messages: list[dict[str, Any]], thoughts: list[str]) -> None:
    """An answer that was cut off in its reasoning is a turn of its own."""
    if any(thoughts):
        messages.append({"role": "assistant", "content": ""})
        _think(messages[-1], thoughts)


def _message(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise _refusal(f"the role of {where} must be one of {', '.join(_ROLES)}")
    role = "system" if role == "developer" else role
    if isinstance(content, str):
        return {"role": role, "content": content}
    return {"role": role, "content": _text(where, content)}


def _text(where: str, parts: Any) -> str:
    if not isinstance(parts, list):
        raise _refusal(f"the content of {where} must be a text or a list of parts")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        key = _TEXT_KEYS.get(kind) if isinstance(kind, str) else None
        if key is None or not isinstance(part.get(key), str):
            raise _refusal(f"{where} has a part of type {kind!r:.60}; only text is supported")
        texts.append(part[key])
    return "".join(texts)


def _reasoning_text(item: Mapping[str, Any]) -> str:
    parts = item.get("content")
    return "".join(
        part["text"]
        for part in (parts if isinstance(parts, list) else ())
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    )


def _call(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    name, arguments, call = (item.get(key) for key in ("name", "arguments", "call_id"))
    if not (isinstance(name, str) and isinstance(arguments, str) and isinstance(call, str)):
        raise _refusal(f"{where} must have call_id, name and arguments, which are texts")
    function = {"name": name, "arguments": arguments}
    return {"id": call, "type": "function", "function": function}


def _call_output(where: str, item: Mapping[str, Any]) -> dict[str, Any]:
    call, output = item.get("call_id"), item.get("output")
    if not isinstance(call, str):
        raise _refusal(f"{where} lacks call_id")
    content = output if isinstance(output, str) else _text(where, output)
    return {"role": "tool", "tool_call_id": call, "content": content}


def _tool(index: int, tool: Any) -> dict[str, Any]:
    """Tools that the server would run itself (search, interpreters) are not here."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else None
        raise RequestError(
            f"tools[{index}] has type {kind!r:.60}; only functions, which the client runs, are "
            "supported",
            param="tools",
        )
    function = {key: value for key, value in tool.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    """Here names and lists are beside the type."""
    if not isinstance(choice, dict):
        return choice
    match choice.get("type"):
        case "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        case "allowed_tools":
            tools = choice.get("tools")
            if isinstance(tools, list):
                tools = [_tool_choice(tool) for tool in tools]
            allowed = {"mode": choice.get("mode"), "tools": tools}
            return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _response_format(form: Mapping[str, Any]) -> dict[str, Any]:
    """Here the schema's fields are beside its type."""
    if form.get("type") != "json_schema":
        return dict(form)
    schema = {key: form[key] for key in ("name", "schema", "strict") if form.get(key) is not None}
    return {"type": "json_schema", "json_schema": schema}


def _refusal(reason: str) -> RequestError:
    return RequestError(reason, param="input")
