"""Which objects of a schema are closed, and that nothing else of it changes."""

from __future__ import annotations

from typing import Any

import pytest

from shared.grammars.closed_schema import close_objects

TEXT = {"type": "string"}
ONE = {"type": "object", "properties": {"a": TEXT}}
CLOSED_ONE = {**ONE, "additionalProperties": False}


def only(*names: str) -> dict[str, Any]:
    return {"properties": dict.fromkeys(names, True), "additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        False,
        {},
        TEXT,
        {"type": "object"},
        {**ONE, "additionalProperties": True},
        {**ONE, "additionalProperties": TEXT},
        {**ONE, "patternProperties": {"^x": TEXT}},
        {**ONE, "unevaluatedProperties": False},
        {"enum": [{"properties": {"a": 1}}]},
        {"const": {"type": "object", "properties": {}}},
    ],
)
def test_what_names_no_properties_or_is_open_by_its_own_word_is_left(schema: Any) -> None:
    assert close_objects(schema) == schema


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (ONE, CLOSED_ONE),
        ({"properties": {"a": TEXT}}, {"properties": {"a": TEXT}, "additionalProperties": False}),
        ({"type": "array", "items": ONE}, {"type": "array", "items": CLOSED_ONE}),
        ({"prefixItems": [ONE]}, {"prefixItems": [CLOSED_ONE]}),
        ({"anyOf": [ONE, TEXT]}, {"anyOf": [CLOSED_ONE, TEXT]}),
        ({"oneOf": [ONE]}, {"oneOf": [CLOSED_ONE]}),
        (
            {"type": "object", "properties": {"properties": ONE}},
            {
                "type": "object",
                "properties": {"properties": CLOSED_ONE},
                "additionalProperties": False,
            },
        ),
        (
            {"type": "object", "additionalProperties": ONE},
            {"type": "object", "additionalProperties": CLOSED_ONE},
        ),
        (
            {"$ref": "#/$defs/x", "$defs": {"x": ONE}},
            {"$ref": "#/$defs/x", "$defs": {"x": CLOSED_ONE}},
        ),
    ],
)
def test_an_object_with_properties_has_no_others(schema: Any, closed: Any) -> None:
    assert close_objects(schema) == closed


def test_parts_of_one_object_are_closed_together() -> None:
    other = {"properties": {"b": ONE}}
    closed = close_objects({"allOf": [ONE, other]})
    assert closed == {"allOf": [ONE, {"properties": {"b": CLOSED_ONE}}, only("a", "b")]}


def test_properties_beside_a_combinator_are_closed_together() -> None:
    closed = close_objects({**ONE, "anyOf": [{"properties": {"b": TEXT}}, {"required": ["a"]}]})
    assert closed["allOf"] == [only("a", "b")]
    assert "additionalProperties" not in closed
    assert closed["anyOf"][0] == {"properties": {"b": TEXT}}


def test_a_definition_that_is_a_part_of_others_is_closed_where_it_is_used() -> None:
    schema = {
        "$defs": {"base": ONE},
        "properties": {
            "x": {"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": TEXT}}]},
            "y": {"$ref": "#/$defs/base"},
        },
    }
    closed = close_objects(schema)
    assert closed["$defs"]["base"] == ONE
    assert closed["properties"]["x"]["allOf"][-1] == only("a", "b")
    assert closed["properties"]["y"]["allOf"] == [only("a")]


def test_one_open_part_opens_the_object() -> None:
    schema = {"allOf": [ONE, {"properties": {}, "additionalProperties": TEXT}]}
    assert close_objects(schema) == schema


def test_references_in_a_circle_end() -> None:
    schema = {"allOf": [{"$ref": "#"}, ONE]}
    assert close_objects(schema)["allOf"][-1] == only("a")
    assert close_objects({"$ref": "#"}) == {"$ref": "#"}
