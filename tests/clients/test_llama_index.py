"""llama-index's OpenAILike: completions, chats, tools and structured answers."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from served import SAID_ARGUMENTS, SAID_TEXT, Served

QUESTION = [ChatMessage(role="user", content="What is a starfish?")]


class Arms(BaseModel):
    """How many arms."""

    arms: int = Field(ge=0, le=9)
    alive: bool


def grow(arms: int, note: str) -> str:
    """Grows arms."""
    return f"{arms} {note}"


def count(arms: bool) -> str:
    """Counts arms."""
    return str(arms)


def model(served: Served, **options: Any) -> OpenAILike:
    fields = {
        "model": served.model,
        "api_base": served.api,
        "api_key": served.key,
        "is_chat_model": True,
        "is_function_calling_model": True,
        "context_window": 2048,
        "max_tokens": 60,
        "temperature": 0.0,
        "max_retries": 0,
    }
    return OpenAILike(**{**fields, **options})


def test_chat_says_the_same_whole_and_streamed(served: Served) -> None:
    whole = model(served).chat(QUESTION)
    parts = list(model(served).stream_chat(QUESTION))
    assert len(parts) > 2
    assert whole.message.content
    assert "".join(part.delta or "" for part in parts) == whole.message.content


async def test_the_asynchronous_form(served: Served) -> None:
    assert (await model(served).achat(QUESTION)).message.content


def test_completions_and_logprobs(served: Served) -> None:
    text = model(served, is_chat_model=False)
    whole = text.complete("Once upon a time").text
    assert whole
    assert "".join(p.delta or "" for p in text.stream_complete("Once upon a time")) == whole
    scored = model(served, logprobs=True, top_logprobs=2, max_tokens=4).chat(QUESTION)
    assert len(scored.logprobs or []) == 4


def test_a_forced_call(served: Served) -> None:
    llm = model(served, max_tokens=100)
    tool = FunctionTool.from_defaults(fn=count)
    answer = llm.chat_with_tools([tool], user_msg="Count.", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "count"
    assert isinstance(call.tool_kwargs["arms"], bool)


def test_a_streamed_call(served: Served) -> None:
    llm = model(served, model=served.scripted_model, api_base=served.scripted_api, max_tokens=400)
    tool = FunctionTool.from_defaults(fn=grow)
    *_, last = llm.stream_chat_with_tools([tool], user_msg="Grow.")
    assert last.message.content == SAID_TEXT
    (call,) = llm.get_tool_calls_from_response(last)
    assert (call.tool_name, call.tool_kwargs) == ("grow", SAID_ARGUMENTS)


@pytest.mark.parametrize("by_schema", [True, False])
def test_a_structured_answer(served: Served, by_schema: bool) -> None:
    llm = model(served, should_use_structured_outputs=by_schema).as_structured_llm(Arms)
    assert isinstance(llm.chat(QUESTION).raw, Arms)


def test_errors_are_openais(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        model(served, api_key="wrong").chat(QUESTION)
    with pytest.raises(openai.NotFoundError):
        model(served, model="gpt-unknown").chat(QUESTION)
    with served.busy(), pytest.raises(openai.RateLimitError):
        model(served, api_key=served.narrow_key).chat(QUESTION)


def test_a_429_is_retried(served: Served) -> None:
    with served.busy_until_refused():
        model(served, api_key=served.narrow_key, max_retries=5, max_tokens=4).chat(QUESTION)


def test_who_leaves_ends_the_session(served: Served) -> None:
    long = {"max_tokens": 1500, "additional_kwargs": {"extra_body": {"ignore_eos": True}}}
    with pytest.raises(openai.APITimeoutError):
        model(served, timeout=0.05, **long).chat(QUESTION)
    served.wait_idle()
