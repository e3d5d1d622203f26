"""Items that an input names instead of sending them, as clients do between an agent's steps."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.api.dialect import Ending
from gateway.api.openai_responses.answer import ResponseAnswer
from gateway.api.openai_responses.bodies import ResponsesBody
from gateway.api.openai_responses.chat import input_messages
from gateway.api.openai_responses.references import with_named_items
from gateway.api.openai_responses.store import ResponseStore, StoredResponse
from gateway.api.responses import Usage
from shared.errors import RequestError

USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=7)
QUESTION = {"role": "user", "content": "Where?"}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "here"}
CALL = {"index": 0, "id": "call_1", "function": {"name": "find", "arguments": '{"x": 1}'}}
DELTAS: list[dict[str, Any]] = [
    {"reasoning_content": "hm"},
    {"content": "I look."},
    {"tool_calls": [CALL]},
]


def answered(store: ResponseStore, number: str, owner: str = "a") -> list[dict[str, Any]]:
    """The items of a response that is remembered."""
    body = msgspec.convert({"input": "hi"}, ResponsesBody)
    answer = ResponseAnswer(id=f"chatcmpl-{number}", created=5, model="m", body=body)
    answer.whole(DELTAS, Ending(reason="tool_calls", stop_string=None, usage=USAGE))
    assert answer.done is not None
    store.put(StoredResponse.of(answer.done, [], owner=owner))
    items: list[dict[str, Any]] = answer.done["output"]
    return items


def named(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "item_reference", "id": item["id"]}


def test_a_named_item_is_the_item() -> None:
    store = ResponseStore(1 << 16)
    thought, text, call = answered(store, "4f_2-9")
    (other, *_) = answered(store, "5")
    given = [QUESTION, named(thought), named(text), {"id": call["id"]}, RESULT, named(other)]
    items = with_named_items(given, store, "a")
    assert items == [QUESTION, thought, text, call, RESULT, other]
    turn = input_messages(items)[1]
    assert (turn["reasoning_content"], turn["content"]) == ("hm", "I look.")
    assert turn["tool_calls"][0]["function"] == {"name": "find", "arguments": '{"x": 1}'}
    assert with_named_items("hi", store, "a") == "hi"


@pytest.mark.parametrize(
    "item_id", ["fc_9_2", "fc_1_9", "fc_1_", "fc__2", "resp_1", "call_1_2", "fc", ""]
)
def test_an_item_that_is_not_remembered_is_named(item_id: str) -> None:
    store = ResponseStore(1 << 16)
    answered(store, "1")
    with pytest.raises(RequestError, match=r"input\[1\]: the item .* is not remembered") as caught:
        with_named_items([QUESTION, {"type": "item_reference", "id": item_id}], store, "a")
    assert (caught.value.param, caught.value.code) == ("input", "item_not_found")


def test_an_item_exists_for_its_owner_alone() -> None:
    store = ResponseStore(1 << 16)
    (*_, call) = answered(store, "1", owner="b")
    with pytest.raises(RequestError, match="not remembered"):
        with_named_items([named(call)], store, "a")
    assert with_named_items([named(call)], store, "b") == [call]


def test_an_item_is_named_once() -> None:
    """Else an input of some bytes a name would grow to an item each."""
    store = ResponseStore(1 << 16)
    (*_, call) = answered(store, "1")
    with pytest.raises(RequestError, match="named twice"):
        with_named_items([named(call), QUESTION, named(call)], store, "a")


@pytest.mark.parametrize("item_id", [None, 7, ["x"]])
def test_a_name_that_is_no_text_is_refused(item_id: object) -> None:
    with pytest.raises(RequestError, match=r"input\[0\] must have an id") as caught:
        with_named_items([{"type": "item_reference", "id": item_id}], ResponseStore(1), "a")
    assert caught.value.param == "input"
