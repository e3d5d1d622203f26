"""A chat as it is to be rendered and answered: its messages, tools and reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from gateway.api.answer_plan import AnswerPlan
from gateway.api.bodies import ChatBody
from gateway.api.guided import RESPONSE_FORMAT, DemandedForm
from gateway.api.messages import read_chat_options, read_messages
from gateway.api.reasoning import effort_variables, reasoning_opened, thinking_budget
from gateway.api.tools import ToolMode, ToolRequest, read_tools
from gateway.chat_template import ChatOptions
from gateway.parsers.formats import HARMONY, TOOL_FORMATS
from gateway.served_model import ServedModel
from gateway.tool_prompt import with_all_fields, with_tools
from shared.errors import RequestError
from shared.types import ThinkingBudget

_PROMPT_END_TOKENS = 32
"""So many tokens show whether a prompt ends inside the reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """`messages` and `options` are for the chat template."""

    messages: Sequence[Mapping[str, Any]]
    options: ChatOptions
    tools: ToolRequest

    @property
    def continued(self) -> Mapping[str, Any] | None:
        """The message that the answer continues."""
        return self.messages[-1] if self.options.continue_final_message else None

    def form(self, demanded: DemandedForm | None) -> DemandedForm | None:
        """What of the demanded form holds for the answer. `response_format` is the form of a text,
        and an answer that must call has none: clients send both. The other fields are forms of the
        whole answer, as in vLLM."""
        is_of_text = demanded is not None and demanded.param == RESPONSE_FORMAT
        return None if is_of_text and self.tools.mode is ToolMode.REQUIRED else demanded


def read_chat(body: ChatBody, served: ServedModel) -> ChatRequest:
    """Raises RequestError."""
    tools = read_tools(body)
    if tools.mode is not ToolMode.NONE and served.formats.tools is None:
        raise RequestError(
            "tools: this gateway reads no calls of tools; start it with --tool-call-parser, or "
            "pass tool_choice='none'",
            param="tools",
        )
    options, messages = read_chat_options(body), read_messages(body.messages)
    reads = served.tokenizer.chat_template(has_tools=bool(tools.tools)).reads
    effort = effort_variables(body, reads, options.variables)
    options = replace(options, variables={**options.variables, **effort})
    if "tools" in reads:
        is_harmony = served.formats.tools is TOOL_FORMATS[HARMONY]
        shown = with_all_fields(tools.tools) if is_harmony else list(tools.tools)
        options = replace(options, tools=shown or None)
    elif tools.tools or _has_calls(messages):
        messages = list(map(dict, with_tools(messages, tools.tools)))
    return ChatRequest(messages=messages, options=options, tools=tools)


def _has_calls(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(m.get("tool_calls") or m.get("role") == "tool" for m in messages)


def plan_answer(
    body: ChatBody,
    chat: ChatRequest,
    served: ServedModel,
    prompt: Sequence[int],
    *,
    demands_form: bool,
) -> AnswerPlan:
    reasoning, opened = served.formats.reasoning, None
    if reasoning is not None:
        end = served.tokenizer.all_token_bytes.join(prompt[-_PROMPT_END_TOKENS:])
        opened = reasoning_opened(reasoning, end.decode(errors="replace"), chat.continued)
    return AnswerPlan(
        formats=served.formats,
        tools=chat.tools,
        opened=opened,
        demands_form=demands_form,
        splits_reasoning=body.separate_reasoning is not False,
        shows_reasoning=body.include_reasoning is not False,
    )


def read_budget(body: ChatBody, plan: AnswerPlan, served: ServedModel) -> ThinkingBudget | None:
    """Raises RequestError."""
    ids_of = served.tokenizer.encode_inside
    return thinking_budget(body, plan.formats.reasoning, plan.opened, ids_of)
