"""Each field that demands a form gives one form, whose size is compared before anybody parses it;
an error for an unusable one names its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.bodies import ChatBody
from gateway.api.guided import DemandedForm, GrammarLimits, read_form, read_json_space
from shared.errors import RequestError
from shared.grammars.closed_schema import NO_SPACE
from shared.grammars.messages import GrammarKind

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LIMITS = GrammarLimits(bytes_max=64 << 10, properties_max=1000)


def body(**fields: Any) -> ChatBody:
    return ChatBody(messages=[], **fields)


def form_of(**fields: Any) -> DemandedForm | None:
    return read_form(body(**fields), LIMITS)


def properties(number: int) -> dict[str, Any]:
    return {"properties": {f"p{i}": True for i in range(number)}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_free_form_needs_no_grammar() -> None:
    assert form_of() is None
    assert form_of(response_format={"type": "text"}) is None
    assert form_of(structured_outputs={"json_object": False, "regex": None}) is None


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
    form = form_of(**fields)
    assert form is not None
    assert form.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(form.text) == SCHEMA


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type":"object"}'),
        ({"structured_outputs": {"json_object": True}}, "json", '{"type":"object"}'),
        ({"guided_regex": "[a-z]+"}, "regex", "[a-z]+"),
        ({"guided_choice": ["yes", 'no "way"']}, "choice", r'["yes","no \"way\""]'),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a"),
    ],
)
def test_every_field_has_its_kind(fields: dict[str, Any], kind: str, text: str) -> None:
    assert form_of(**fields) == DemandedForm(
        param=next(iter(fields)), kind=GrammarKind(kind), text=text
    )


@pytest.mark.parametrize(
    ("fields", "space"),
    [
        ({"guided_json": SCHEMA}, " ?"),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": "[ ]{0,2}"}, "[ ]{0,2}"),
        ({"response_format": {"type": "json_object"}, "guided_whitespace_pattern": ""}, NO_SPACE),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "\\n?"}}, "\\n?"),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, NO_SPACE),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": False}}, " ?"),
        ({"structured_outputs": {"json": SCHEMA, "disable_fallback": True}}, " ?"),
    ],
)
def test_a_request_says_what_white_space_its_json_has(fields: dict[str, Any], space: str) -> None:
    form = read_form(body(**fields), LIMITS, json_space=" ?")
    assert form is not None
    assert form.json_space == space
    assert read_json_space(body(**fields), LIMITS, " ?") == space


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": 3}, "guided_whitespace_pattern"),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " " * 70_000},
            "guided_whitespace_pattern",
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": [" "]}},
            "structured_outputs",
        ),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_json": "{not json"}, "guided_json"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"structured_outputs": {"shape": "x"}}, "structured_outputs"),
        ({"structured_outputs": 1}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_regex": "\u2126" * 30_000}, "guided_regex"),
        ({"guided_grammar": 'root ::= "a" ' + '"a" ' * 1_000_000}, "guided_grammar"),
        ({"guided_json": '{"type": ' + " " * 70_000}, "guided_json"),
        ({"guided_json": {"enum": ["a" * 70_000]}}, "guided_json"),
        ({"guided_json": properties(1001)}, "guided_json"),
        ({"guided_json": {"anyOf": [properties(600), properties(600)]}}, "guided_json"),
        ({"guided_json": json.dumps(properties(1001))}, "guided_json"),
        ({"guided_json": nested(100)}, "guided_json"),
        ({"guided_json": "[" * 60_000}, "guided_json"),
        ({"guided_json": {"enum": json.loads("[" * 100 + "]" * 100)}}, "guided_json"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": properties(1001)},
                }
            },
            "response_format",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        form_of(**fields)
    assert refused.value.param == param
    assert len(str(refused.value)) < 200


def test_what_is_just_small_enough_is_read() -> None:
    assert form_of(guided_json=properties(1000)) is not None
    assert form_of(guided_json=nested(60)) is not None
    assert form_of(guided_regex="a" * (64 << 10)) is not None


def test_forms_that_exclude_each_other_are_named_as_they_were_sent() -> None:
    inner = {"json": {}, "regex": "a"}
    for fields, named in (
        ({"structured_outputs": inner}, "structured_outputs.json and structured_outputs.regex"),
        (
            {"guided_regex": "a", "structured_outputs": {"json_object": True}},
            "guided_regex and structured_outputs.json_object",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex and response_format",
        ),
    ):
        with pytest.raises(RequestError, match=f"^{named} exclude each other") as caught:
            form_of(**fields)
        assert caught.value.param in fields
