"""Brings the messages of a chat into the form that a template reads: without nulls, with reasoning
under every name for it, and with contents and arguments of calls as texts or as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.call_history import one_call_a_turn
from gateway.template_forms import Message, TemplateForms
from shared.errors import RequestError

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
NO_ARGUMENTS = (None, "", "null")
"""Spellings of a call without arguments."""


def prepare_messages(messages: Sequence[Mapping[str, Any]], forms: TemplateForms) -> list[Message]:
    """New messages; their other keys, custom ones too, are handed on. Raises RequestError if a
    call's arguments are no JSON object."""
    prepared = [_prepared(message, forms) for message in messages]
    return one_call_a_turn(prepared) if forms.one_call else prepared


def _prepared(message: Mapping[str, Any], forms: TemplateForms) -> Message:
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list) and plain.get("role") not in forms.list_roles:
        plain["content"] = "".join(part["text"] for part in plain["content"])
    if "tool_calls" in plain:
        calls = [_prepared_call(call, forms) for call in plain.pop("tool_calls")]
        # A template takes an empty list for a message of calls, and leaves its content out.
        plain |= {"tool_calls": calls} if calls else {}
    plain = _with_reasoning(plain)
    return _with_one_text(plain) if forms.one_text and plain.get("tool_calls") else plain


def _with_one_text(message: Message) -> Message:
    """What a model has said before a call becomes the end of its reasoning: the template reads
    either as that."""
    text, reasoning = message.get("content"), message.get("reasoning_content")
    if not (isinstance(text, str) and text and isinstance(reasoning, str) and reasoning):
        return message
    said = f"{reasoning}\n\n{text}"
    return {**message, "content": "", "thinking": said, "reasoning_content": said}


def _with_reasoning(message: Message) -> Message:
    """As transformers: templates read `reasoning_content`, gpt-oss's reads `thinking`."""
    names = (name for name in _REASONING_NAMES if name in message)
    name = next(names, None)
    if name is None:
        return message
    reasoning = message[name]
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def called_function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name and the arguments of a call. OpenAI's shape holds them in `function`; some clients
    send them flat."""
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _prepared_call(call: Mapping[str, Any], forms: TemplateForms) -> Message:
    function = called_function(call)
    prepared = _with_arguments(function, forms)
    return prepared if function is call else {**call, "function": prepared}


def _with_arguments(function: Mapping[str, Any], forms: TemplateForms) -> Message:
    arguments = function.get("arguments")
    values = parsed_arguments(arguments)
    if not forms.text_arguments:
        return {**function, "arguments": values}
    if isinstance(arguments, str) and arguments not in NO_ARGUMENTS:
        return {**function, "arguments": arguments}
    return {**function, "arguments": msgspec.json.encode(values).decode()}


def parsed_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments of a call as values. Raises RequestError if they are no JSON object."""
    if arguments in NO_ARGUMENTS:
        return {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except RecursionError as error:
            raise RequestError(
                "messages: the arguments of a tool call are nested too deeply", param="messages"
            ) from error
        except msgspec.DecodeError as error:
            raise RequestError(
                f"messages: the arguments of a tool call are not JSON ({error}); send the call's "
                "arguments whole, as the model wrote them",
                param="messages",
            ) from error
    if not isinstance(arguments, dict):
        raise RequestError(
            "messages: the arguments of a tool call must be a JSON object", param="messages"
        )
    return arguments
