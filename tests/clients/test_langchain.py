"""langchain-openai: chats, tools and structured answers, as its agents use them."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from served import COMPARE, SAID_ARGUMENTS, SAID_TEXT, Served, compared, run_tool


class Arms(BaseModel):
    """How many arms."""

    arms: int = Field(ge=0, le=9)
    alive: bool


@tool
def count(arms: bool) -> str:
    """Counts arms."""
    return f"counted: {arms}"


def chat(served: Served, **options: Any) -> ChatOpenAI:
    fields = {"model": served.model, "base_url": served.api, "api_key": served.key}
    return ChatOpenAI(**{**fields, "max_retries": 0, "max_tokens": 60, **options})


def test_chat_says_the_same_whole_streamed_and_in_batches(served: Served) -> None:
    model = chat(served, temperature=0, stream_usage=True)
    whole = model.invoke("What is a starfish?")
    chunks = list(model.stream("What is a starfish?"))
    assert len(chunks) > 2
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert [m.content for m in model.batch(["What is a starfish?"] * 3)] == [whole.content] * 3
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0


async def test_the_asynchronous_form(served: Served) -> None:
    message = await chat(served, temperature=0).ainvoke("What is a starfish?")
    assert message.content


def test_completions_and_logprobs(served: Served) -> None:
    text = OpenAI(model=served.model, base_url=served.api, api_key=served.key, max_tokens=8)
    assert text.invoke("Once upon a time")
    scored = chat(served, max_tokens=4).bind(logprobs=True, top_logprobs=2).invoke("hi")
    assert len(scored.response_metadata["logprobs"]["content"]) == 4


def test_a_forced_call_and_its_result(served: Served) -> None:
    model = chat(served, temperature=0)
    question = HumanMessage("Count.")
    call = model.bind_tools([count], tool_choice="any").invoke([question])
    (made,) = call.tool_calls
    assert made["name"] == "count"
    assert isinstance(made["args"]["arms"], bool)
    result = count.invoke(made)
    assert isinstance(result, ToolMessage)
    assert model.bind_tools([count]).invoke([question, call, result]).type == "ai"


def test_a_streamed_call(served: Served) -> None:
    @tool
    def grow(arms: int, note: str) -> str:
        """Grows arms."""
        return note

    scripted = chat(
        served,
        model=served.scripted_model,
        base_url=served.scripted_api,
        api_key="none",
        max_tokens=None,
    )
    parts = list(scripted.bind_tools([grow]).stream("Grow."))
    message = parts[0]
    for part in parts[1:]:
        message += part
    assert message.content == SAID_TEXT
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("grow", SAID_ARGUMENTS)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_answers(served: Served, method: Any) -> None:
    model = chat(served, temperature=0).with_structured_output(Arms, method=method)
    assert isinstance(model.invoke("How many arms?"), Arms)


def test_the_responses_api(served: Served) -> None:
    model = chat(served, use_responses_api=True, temperature=0)
    assert model.invoke("What is a starfish?").text
    assert "".join(chunk.text for chunk in model.stream("What is a starfish?"))
    assert isinstance(model.with_structured_output(Arms).invoke("How many arms?"), Arms)


def test_errors_are_openais(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        chat(served, api_key="wrong").invoke("hi")
    with pytest.raises(openai.NotFoundError):
        chat(served, model="gpt-4o").invoke("hi")
    with pytest.raises(openai.BadRequestError):
        chat(served, temperature=9).invoke("hi")
    with served.busy(), pytest.raises(openai.RateLimitError):
        chat(served, api_key=served.narrow_key).invoke("hi")


def test_a_429_is_retried(served: Served) -> None:
    with served.busy_until_refused():
        chat(served, api_key=served.narrow_key, max_retries=5, max_tokens=4).invoke("hi")


def test_who_leaves_ends_the_session(served: Served) -> None:
    long = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APITimeoutError):
        chat(served, timeout=0.05, **long).invoke("hi")
    served.wait_idle()
    stream = chat(served, **long).stream("hi")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    served.wait_idle()


@tool
def colour(star: str) -> str:
    """The colour of a star."""
    return run_tool("colour", {"star": star})


@tool
def compare(first: str, second: str) -> str:
    """Compares two colours."""
    return run_tool("compare", {"first": first, "second": second})


@pytest.mark.parametrize(
    ("options", "thought"),
    [
        ({}, False),
        ({"streaming": True}, False),
        ({"use_responses_api": True}, True),
        ({"use_responses_api": True, "streaming": True}, False),
        ({"use_previous_response_id": True, "streaming": True}, True),
    ],
)
def test_an_agent(served: Served, options: dict[str, Any], thought: bool) -> None:
    """Results come the other way round. `thought`: the reasoning is sent back."""
    where = {"model": served.scripted_model, "base_url": served.agent_api, "api_key": "none"}
    tools = {each.name: each for each in (colour, compare)}
    model = chat(served, **where, **{"max_tokens": None, **options}).bind_tools([*tools.values()])
    messages: list[Any] = [HumanMessage(COMPARE)]
    num_calls = []
    for _ in range(4):
        answer = model.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        num_calls.append(len(answer.tool_calls))
        messages += [tools[call["name"]].invoke(call) for call in reversed(answer.tool_calls)]
    assert num_calls == [2, 1]
    assert answer.text == compared(thought=thought)
