"""A request of the Messages API as the body of `/v1/chat/completions` that asks for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.api.anthropic.answer import NO_THREADS
from gateway.api.anthropic.bodies import CountBody, MessagesBody, Thinking
from gateway.api.reasoning import EFFORTS
from shared.errors import RequestError

_THINKING = {"enabled": True, "adaptive": True, "disabled": False}
_ABSENT = {
    "container": "no code runs here",
    "mcp_servers": "tools run at the client; pass them as tools",
    "thread": "no conversation is held here; pass all messages",
    "compaction": "the model reads all messages; pass fewer of them",
}
_CODES = {"thread": NO_THREADS}
_TEXT_ONLY = "only text, tool_use, tool_result and thinking are supported"


def prompt_fields(body: CountBody) -> dict[str, Any]:
    """The fields that make up the prompt. Raises RequestError."""
    _check_nothing_is_cleared(body.context_management)
    chat: dict[str, Any] = {"messages": _messages(body), "model": body.model}
    thinks = _thinks(body.thinking)
    chat["chat_template_kwargs"] = {
        **{"enable_thinking": thinks, "thinking": thinks},
        **_effort(body),
    }
    if _is_begun_answer(chat["messages"][-1:]):
        chat["continue_final_message"] = True
    if body.tools:
        chat["tools"] = [_tool(index, tool) for index, tool in enumerate(body.tools)]
    return {**chat, **_tool_choice(body.tool_choice)}


def _check_nothing_is_cleared(management: Mapping[str, Any] | None) -> None:
    """Agents send it always, also if all is to be kept. Raises RequestError if something might be
    cleared: the model reads all of it here."""
    edits = (management or {}).get("edits") or []
    if not isinstance(edits, list) or any(
        not isinstance(edit, dict) or edit.get("keep") != "all" for edit in edits
    ):
        raise RequestError(
            "context_management: nothing is cleared here; leave out edits that do not keep all, "
            "and pass fewer messages",
            param="context_management",
        )


def chat_fields(body: MessagesBody) -> dict[str, Any]:
    """Raises RequestError."""
    for name, why in _ABSENT.items():
        if getattr(body, name):
            reason = f"{name} is not supported: {why}"
            raise RequestError(reason, param=name, code=_CODES.get(name))
    chat = {**prompt_fields(body), **body.answer_fields()}
    chat |= {
        "max_tokens": body.max_tokens,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stop": body.stop_sequences,
        "seed": body.seed,
        "response_format": _response_format(body),
    }
    thinking = body.thinking
    chat["include_reasoning"] = _shows_thinking(thinking)
    if thinking is not None and thinking.type == "enabled" and thinking.budget_tokens is not None:
        chat["thinking_token_budget"] = thinking.budget_tokens
    return {name: value for name, value in chat.items() if value is not None}


def _effort(body: CountBody) -> dict[str, str]:
    """For templates that read it. Raises RequestError."""
    effort = None if body.output_config is None else body.output_config.effort
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise RequestError(
            f"output_config: the effort must be one of {', '.join(EFFORTS)}", param="output_config"
        )
    return {"reasoning_effort": effort}


def _thinks(thinking: Thinking | None) -> bool:
    """Raises RequestError."""
    if thinking is None:
        return False
    if thinking.type not in _THINKING:
        raise RequestError(
            f"thinking: the type must be one of {', '.join(_THINKING)}", param="thinking"
        )
    return _THINKING[thinking.type]


def _shows_thinking(thinking: Thinking | None) -> bool:
    """Raises RequestError."""
    if thinking is None or not _thinks(thinking):
        return False
    if thinking.display not in (None, "summarized", "omitted"):
        raise RequestError("thinking: display must be summarized or omitted", param="thinking")
    return thinking.display != "omitted"


def _is_begun_answer(last: Sequence[Mapping[str, Any]]) -> bool:
    """An answer that the client has begun is gone on with. One that ends in calls is not begun."""
    return any(
        message["role"] == "assistant" and message["content"] and not message.get("tool_calls")
        for message in last
    )


def _response_format(body: MessagesBody) -> dict[str, Any] | None:
    """`output_format` is the older name of `output_config.format`. Raises RequestError."""
    param, form = "output_config", None if body.output_config is None else body.output_config.format
    if form is None:
        param, form = "output_format", body.output_format
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or "schema" not in form:
        raise RequestError(f"{param}: a form has the type json_schema and a schema", param=param)
    return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}


def _messages(body: CountBody) -> list[dict[str, Any]]:
    messages = []
    if body.system:
        messages.append({"role": "system", "content": _text("system", body.system)})
    for index, message in enumerate(body.messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise _refusal(f"{where} must be an object whose role is user or assistant")
        content = message.get("content")
        if isinstance(content, str):
            messages.append({"role": message["role"], "content": content})
        elif isinstance(content, list):
            read = _assistant_turn if message["role"] == "assistant" else _user_turn
            messages += read(where, content)
        else:
            raise _refusal(f"the content of {where} must be a text or a list of blocks")
    return messages


def _assistant_turn(where: str, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        match _kind(where, block):
            case "text":
                texts.append(_string(where, block, "text"))
            case "thinking":
                thoughts.append(_string(where, block, "thinking"))
            case "redacted_thinking":
                pass  # nobody but who made it can read it
            case "tool_use":
                calls.append(_call(where, block))
            case kind:
                raise _refusal(f"{where} has a block of type {kind!r:.60}; {_TEXT_ONLY}")
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        turn["reasoning_content"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return [turn]


def _user_turn(where: str, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """The results of tools are messages of their own, in the order of the blocks."""
    turns: list[dict[str, Any]] = []
    for block in blocks:
        match _kind(where, block):
            case "text":
                text = _string(where, block, "text")
                if turns and turns[-1]["role"] == "user":
                    turns[-1]["content"] += text
                else:
                    turns.append({"role": "user", "content": text})
            case "tool_result":
                content = _text(where, block.get("content") or "")
                if block.get("is_error"):
                    content = f"Error: {content}"
                call = _string(where, block, "tool_use_id")
                turns.append({"role": "tool", "tool_call_id": call, "content": content})
            case kind:
                raise _refusal(f"{where} has a block of type {kind!r:.60}; {_TEXT_ONLY}")
    return turns


def _call(where: str, block: Mapping[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise _refusal(f"the input of a tool_use of {where} must be an object")
    function = {
        "name": _string(where, block, "name"),
        "arguments": msgspec.json.encode(arguments).decode(),
    }
    return {"id": _string(where, block, "id"), "type": "function", "function": function}


def _tool(index: int, tool: Any) -> dict[str, Any]:
    """Tools that the server would run itself (web search and the like) are not here."""
    if not isinstance(tool, dict) or tool.get("type", "custom") != "custom":
        raise RequestError(f"tools[{index}] must be a tool that you run yourself", param="tools")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    if choice is None:
        return {}
    parallel = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    match choice.get("type"):
        case "auto":
            return {"tool_choice": "auto", **parallel}
        case "none":
            return {"tool_choice": "none"}
        case "any":
            return {"tool_choice": "required", **parallel}
        case "tool":
            function = {"name": choice.get("name")}
            return {"tool_choice": {"type": "function", "function": function}, **parallel}
    raise RequestError("tool_choice must have a type: auto, any, tool or none", param="tool_choice")


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refusal(f"{where} must be a text or a list of text blocks")
    parts = []
    for block in content:
        if _kind(where, block) != "text":
            raise _refusal(f"{where} may have blocks of text only")
        parts.append(_string(where, block, "text"))
    return "".join(parts)


def _kind(where: str, block: Any) -> Any:
    if not isinstance(block, dict):
        raise _refusal(f"a block of {where} must be an object")
    return block.get("type")


def _string(where: str, block: Mapping[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _refusal(f"a block of {where} lacks {name}")
    return value


def _refusal(reason: str) -> RequestError:
    return RequestError(reason, param="messages")
