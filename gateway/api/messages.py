"""Reads the messages of a chat, and what a request asks of the chat template. Checks what every
template relies on; all other keys of a message are handed on to the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.api.bodies import ChatBody
from gateway.call_history import in_order_of_calls
from gateway.chat_template import ChatOptions
from shared.errors import RequestError

_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
"""Type of a part of a content → the part's key that holds the text."""

MESSAGES_MAX = 1024
MESSAGE_PARTS_MAX = 4096
MESSAGES_BYTES_MAX = 2 << 20
"""Limits on a chat: a template runs over each message, each part and each call, however short."""


def read_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Each has a `role`, and a `content` that is a text, null or a list of `text` parts. Results of
    calls come in the order of the calls. Raises RequestError."""
    if not messages:
        raise _refusal("there must be at least one")
    _check_size(messages)
    return in_order_of_calls([_message(index, each) for index, each in enumerate(messages)])


def _check_size(messages: Sequence[Any]) -> None:
    if len(messages) > MESSAGES_MAX:
        raise _refusal(f"a chat may have {MESSAGES_MAX} messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    calls = [message.get("tool_calls") for message in messages if isinstance(message, dict)]
    num_calls = sum(len(each) for each in calls if isinstance(each, list))
    if len(parts) + num_calls > MESSAGE_PARTS_MAX:
        raise _refusal(f"the messages of a chat may have {MESSAGE_PARTS_MAX} parts and calls")
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    num_bytes = sum(len(t.encode()) for t in [*contents, *texts] if isinstance(t, str))
    if num_bytes > MESSAGES_BYTES_MAX:
        raise _refusal(f"the messages of a chat may have {MESSAGES_BYTES_MAX} bytes")


def read_chat_options(body: ChatBody) -> ChatOptions:
    """Raises RequestError."""
    documents = body.documents
    if documents is not None and not all(isinstance(each, Mapping) for each in documents):
        raise RequestError("documents must be a list of objects", param="documents")
    return ChatOptions(
        documents=documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs or {},
    )


def _message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _refusal(f"message {index} must be an object with a role")
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise _refusal(f"the content of message {index} must be a text or a list of parts")
    calls = message.get("tool_calls")
    if calls is not None and not _is_list_of_objects(calls):
        raise _refusal(f"the tool_calls of message {index} must be a list of objects")
    if isinstance(content, list):
        return {**message, "content": [_part(index, part) for part in content]}
    return dict(message)


def _part(index: int, part: Any) -> dict[str, Any]:
    """A part of type `text`, with its other keys."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise _refusal(f"message {index} has content of type {kind!r:.60}; only text is supported")
    text = part.get(key)
    if not isinstance(text, str):
        raise _refusal(f"a {kind} part of message {index} has no {key}")
    return {**part, "type": "text", "text": text}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _refusal(reason: str) -> RequestError:
    return RequestError(f"messages: {reason}", param="messages")
