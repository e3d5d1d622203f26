"""Which objects of a schema are closed, and that nothing else of it changes."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import GrammarError
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


@pytest.mark.parametrize(
    ("name", "reference"), [("a/b", "a~1b"), ("a~b", "a~0b"), ("Box[int]", "Box%5Bint%5D")]
)
def test_a_reference_finds_a_definition_of_any_name(name: str, reference: str) -> None:
    schema = {"$defs": {name: ONE}, "properties": {"x": TEXT}, "$ref": f"#/$defs/{reference}"}
    closed = close_objects(schema)
    assert closed["allOf"] == [only("a", "x")]
    assert closed["$defs"] == {name: ONE}


def test_a_reference_finds_a_member_of_a_list() -> None:
    parts = [{"properties": {"b": TEXT}}, {"type": "object"}]
    closed = close_objects({**ONE, "$ref": "#/prefixItems/0", "prefixItems": parts})
    assert closed["allOf"] == [only("a", "b")]


def test_one_open_part_opens_the_object() -> None:
    schema = {"allOf": [ONE, {"properties": {}, "additionalProperties": TEXT}]}
    assert close_objects(schema) == schema


def test_references_in_a_circle_end() -> None:
    schema = {"allOf": [{"$ref": "#"}, ONE]}
    assert close_objects(schema)["allOf"][-1] == only("a")
    assert close_objects({"$ref": "#"}) == {"$ref": "#"}


def all_to_all(count: int) -> dict[str, Any]:
    """Each definition may be any of them all."""
    any_of = [{"$ref": f"#/$defs/d{number}"} for number in range(count)]
    defs = {f"d{n}": {"properties": {f"p{n}": TEXT}, "anyOf": any_of} for n in range(count)}
    return {"properties": {"x": TEXT}, "anyOf": any_of, "$defs": defs}


def test_references_between_all_definitions_are_followed_once_each() -> None:
    closed = close_objects(all_to_all(12))
    assert closed["allOf"] == [only(*sorted(["x", *(f"p{n}" for n in range(12))]))]


def test_a_chain_of_references_may_be_long() -> None:
    chain = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(2_000)}
    closed = close_objects({**ONE, "$ref": "#/$defs/d0", "$defs": chain})
    assert closed["allOf"] == [only("a")]


def test_references_that_are_too_many_to_follow_are_refused() -> None:
    with pytest.raises(GrammarError, match="refer to each other too often"):
        close_objects(all_to_all(60))


KEYS = [
    *("$ref", "properties", "anyOf", "oneOf", "if", "then", "else", "not", "items"),
    *("prefixItems", "$defs", "definitions", "dependentSchemas", "type", "required", "enum"),
]


@pytest.mark.parametrize("beside", [{}, ONE, {"allOf": [ONE]}])
def test_what_is_no_schema_is_left_for_the_compiler_to_refuse(beside: dict[str, Any]) -> None:
    odd: list[Any] = [None, True, 5, "x", [None], [5], ["x"], {"a": 5}]
    for key in set(KEYS) - beside.keys():
        assert [close_objects({**beside, key: value})[key] for value in odd] == odd
    assert close_objects({**ONE, "allOf": 5}) == {**ONE, "allOf": 5}
