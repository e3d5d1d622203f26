"""A last message that the model is to continue: its end is marked before the template runs, and
the prompt is cut there afterwards, as transformers' `continue_final_message` does."""

from __future__ import annotations

from gateway.template_forms import Message
from shared.errors import RequestError

_MARK = "CONTINUED-FROM-HERE "
"""Behind the text. Whether its space is still there shows whether the template strips messages."""


def mark_end(message: Message) -> str:
    """Marks the end of the message's text, in place, and returns the text without the mark. Raises
    RequestError if there is none."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _MARK
        return content
    parts = list(content or [])
    if not parts:
        raise _refusal("the last message has no content")
    text = str(parts[-1]["text"])
    message["content"] = [*parts[:-1], {**parts[-1], "text": text + _MARK}]
    return text


def cut_at_end(rendered: str, text: str) -> str:
    """The prompt up to the end of the marked `text`. Raises RequestError if the template left the
    text or its end out."""
    stripped = _MARK.strip()
    at = rendered.rfind(stripped)
    if at < 0 or text.strip() not in rendered:
        raise _refusal("the model's chat template does not show the last message as it is")
    if rendered[at : at + len(_MARK)] == _MARK:
        return rendered[:at]
    return rendered[:at].rstrip()


def _refusal(reason: str) -> RequestError:
    return RequestError(
        f"continue_final_message: {reason}; end `messages` with the assistant's text that the "
        "model shall continue",
        param="continue_final_message",
    )
