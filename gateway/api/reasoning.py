"""Reads how much a chat's answer shall reason, and where its prompt leaves the reasoning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from gateway.api.bodies import ChatBody
from gateway.api.fields import INT64_MAX, check_range
from gateway.parsers.formats import ReasoningFormat
from shared.errors import RequestError
from shared.types import ThinkingBudget

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SWITCHES = ("enable_thinking", "thinking")
"""Variables of chat templates that turn reasoning on or off: Qwen's and GLM's, DeepSeek's."""
_THINKING = {"enabled": True, "adaptive": True, "disabled": False}


def effort_variables(
    body: ChatBody, reads: Collection[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """What `reasoning_effort` and `thinking` set of the template's variables, besides those that
    the request gives itself; of the switches `thinking` says more. `reads` are the variables that
    the template reads. Raises RequestError if it reads none of these."""
    known: dict[str, Any] = {}
    effort = body.reasoning_effort
    if effort is not None:
        if effort not in EFFORTS:
            raise RequestError(
                f"reasoning_effort must be one of {', '.join(EFFORTS)}", param="reasoning_effort"
            )
        values = {"reasoning_effort": effort, **dict.fromkeys(_SWITCHES, effort != "none")}
        known |= _known("reasoning_effort", values, reads)
    if body.thinking is not None:
        known |= _known("thinking", dict.fromkeys(_SWITCHES, _is_on(body.thinking)), reads)
    return {name: value for name, value in known.items() if name not in given}


def _known(param: str, values: Mapping[str, Any], reads: Collection[str]) -> dict[str, Any]:
    known = {name: value for name, value in values.items() if name in reads}
    if not known:
        raise RequestError(
            f"{param}: this model's chat template knows nothing of it; leave the field out",
            param=param,
        )
    return known


def _is_on(thinking: Any) -> bool:
    """Raises RequestError."""
    kind = thinking.get("type") if isinstance(thinking, dict) and len(thinking) == 1 else None
    if not isinstance(kind, str) or kind not in _THINKING:
        raise RequestError(
            f"thinking must be an object with a type alone: {', '.join(_THINKING)}",
            param="thinking",
        )
    return _THINKING[kind]


def reasoning_opened(
    form: ReasoningFormat, prompt_end: str, continued: Mapping[str, Any] | None
) -> bool | None:
    """True if the answer begins inside the reasoning, False if the prompt has ended it, None if the
    answer may begin one. `prompt_end` is the end of the prompt's text, `continued` the message that
    the answer continues."""
    if form.is_harmony:
        return None
    if continued is not None and (content := _text(continued.get("content"))):
        begun, ended = content.rfind(form.start), content.rfind(form.end)
        return begun > ended
    end = prompt_end.rstrip()
    if end.endswith(form.start):
        return True
    return False if end.endswith(form.end) else None


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def thinking_budget(
    body: ChatBody,
    form: ReasoningFormat | None,
    opened: bool | None,
    ids_of: Callable[[str], Sequence[int]],
) -> ThinkingBudget | None:
    """As vLLM: -1 is no limit. `ids_of` encodes a text from the middle of a prompt. Raises
    RequestError."""
    tokens = check_range("thinking_token_budget", body.thinking_token_budget, -1, -1, INT64_MAX)
    if tokens < 0 or opened is False:
        return None
    if form is None:
        raise RequestError(
            "thinking_token_budget: this model's reasoning is not split off; start the gateway "
            "with --reasoning-parser, or leave the field out",
            param="thinking_token_budget",
        )
    return ThinkingBudget(
        tokens=tokens,
        opened=bool(opened) or form.implicit,
        start_ids=tuple(ids_of(form.start)),
        end_ids=tuple(ids_of(form.end)),
        forced_ids=tuple(ids_of(form.forced_end)),
    )
