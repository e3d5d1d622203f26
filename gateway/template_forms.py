"""Finds out what a chat template reads, by rendering messages that tell: lists of parts or texts as
contents, values or JSON text as the arguments of calls, several calls, and texts beside calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

ROLES = ("user", "system", "developer", "assistant", "tool")

_FIRST, _SECOND = "Firstprobe", "Secondprobe"
_PARTS = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
_ARGUMENTS = {"probe": _FIRST}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "Probes.",
            "parameters": {
                "type": "object",
                "properties": {"probe": {"type": "string", "description": "A text."}},
                "required": ["probe"],
            },
        },
    }
]

Render = Callable[[Sequence[Message], Mapping[str, Any]], str | None]
"""Messages and variables → the prompt; None if the template rejects them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateForms:
    """What a template reads. Contents of `list_roles` may be lists of parts; all others are one
    text. `text_arguments`: the arguments of a call in the history are JSON text; else values.
    `one_call`: of a turn's calls one is read. `one_text`: beside calls either text or reasoning may
    stand, not both."""

    list_roles: frozenset[str] = frozenset()
    text_arguments: bool = False
    one_call: bool = False
    one_text: bool = False


def find_forms(render: Render) -> TemplateForms:
    text_arguments = not _shows_arguments(render, _ARGUMENTS) and _shows_arguments(
        render, json.dumps(_ARGUMENTS)
    )
    return TemplateForms(
        list_roles=frozenset(role for role in ROLES if _reads_lists(render, role)),
        text_arguments=text_arguments,
        one_call=_reads_one_call(render, text_arguments),
        one_text=_reads_one_text(render, text_arguments),
    )


def _reads_lists(render: Render, role: str) -> bool:
    """A template that reads parts shows their texts; another shows the whole list, or fails."""
    prompt = render(_chat_with(role, _PARTS), {"tools": _TOOLS if role == "tool" else None})
    if prompt is None or _FIRST not in prompt or _SECOND not in prompt:
        return False
    return f"'{_FIRST}'" not in prompt and f'"{_FIRST}"' not in prompt


def _shows_arguments(render: Render, arguments: Any) -> bool:
    """A template that wants text shows values as Python writes them, or fails."""
    prompt = render([*_called(arguments), _answered(_SECOND)], {"tools": _TOOLS})
    return prompt is not None and _FIRST in prompt and repr(_ARGUMENTS) not in prompt


def _reads_one_call(render: Render, text_arguments: bool) -> bool:
    """A template that reads one call of a turn leaves out the second, or fails. One that shows no
    calls at all reads none."""
    question, turn = _called(_probe_arguments(_FIRST, text_arguments))
    function = {"name": "probe", "arguments": _probe_arguments(_SECOND, text_arguments)}
    second = {**turn["tool_calls"][0], "id": "call00002", "function": function}
    both = {**turn, "tool_calls": [*turn["tool_calls"], second]}
    results = [_answered("x"), {**_answered("x"), "tool_call_id": "call00002"}]
    one = render([question, turn, results[0]], {"tools": _TOOLS})
    two = render([question, both, *results], {"tools": _TOOLS})
    return one is not None and _FIRST in one and (two is None or _SECOND not in two)


def _reads_one_text(render: Render, text_arguments: bool) -> bool:
    """A template that fails on both takes each alone."""
    question, turn = _called(_probe_arguments("x", text_arguments))
    reasoning = {"reasoning_content": _SECOND, "thinking": _SECOND}

    def is_read(texts: Mapping[str, str]) -> bool:
        chat = [question, {**turn, **texts}, _answered("x")]
        return render(chat, {"tools": _TOOLS}) is not None

    return (
        is_read({"content": _FIRST})
        and is_read(reasoning)
        and not is_read({"content": _FIRST, **reasoning})
    )


def _probe_arguments(value: str, text_arguments: bool) -> Any:
    return json.dumps({"probe": value}) if text_arguments else {"probe": value}


def _chat_with(role: str, content: Any) -> list[Message]:
    question = {"role": "user", "content": "Question"}
    message = {"role": role, "content": content}
    match role:
        case "user":
            return [message]
        case "assistant":
            return [question, message, question]
        case "tool":
            return [*_called(_ARGUMENTS), _answered(content)]
    return [message, question]


def _called(arguments: Any) -> list[Message]:
    """Nine characters are what Mistral's templates demand of a call's id."""
    function = {"name": "probe", "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    return [
        {"role": "user", "content": "Question"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]


def _answered(content: Any) -> Message:
    return {"role": "tool", "tool_call_id": "call00001", "name": "probe", "content": content}
