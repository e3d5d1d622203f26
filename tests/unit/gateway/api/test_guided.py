"""Each field that demands a form gives one grammar; an error for an unusable form names its
field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from gateway.api.bodies import ChatBody
from gateway.api.guided import read_grammar
from shared.errors import RequestError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def body(**fields: Any) -> ChatBody:
    return ChatBody(messages=[], **fields)


def test_free_form_needs_no_grammar() -> None:
    assert read_grammar(body()) == ""
    assert read_grammar(body(response_format={"type": "text"})) == ""
    assert read_grammar(body(structured_outputs={"json_object": False, "regex": None})) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
    ],
)
def test_a_schema_is_the_same_however_it_is_asked_for(fields: dict[str, Any]) -> None:
    grammar = json.loads(read_grammar(body(**fields)))
    schema = grammar["grammars"][0]["json_schema"]
    assert schema | SCHEMA == schema
    assert set(schema) - set(SCHEMA) == {"x-guidance"}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"guided_regex": "[a-z]+"},
        {"guided_choice": ["yes", 'no "way"']},
        {"guided_grammar": 'start: "a" | "b"'},
        {"guided_grammar": 'root ::= "a" | "b"'},
    ],
)
def test_every_kind_is_a_grammar_that_the_library_takes(fields: dict[str, Any]) -> None:
    grammar = read_grammar(body(**fields))
    assert grammar
    assert LLMatcher.validate_grammar(grammar) == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"guided_json": "{not json"}, "guided_json"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_grammar": 'start: "a" nothing'}, "guided_grammar"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"structured_outputs": {"shape": "x"}}, "structured_outputs"),
        ({"structured_outputs": 1}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_grammar(body(**fields))
    assert refused.value.param == param
