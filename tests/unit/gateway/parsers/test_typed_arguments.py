"""Of what types a schema says that a value is, however the schema is nested."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.parsers.typed_arguments import types_of


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": [1, "a", None]}, {"integer", "string", "null"}),
        (nested(3), {"string", "null"}),
        ({"anyOf": [{"type": "string"}, {}]}, set()),
        (nested(100_000), set()),
        ({"$ref": "#/$defs/x"}, set()),
        ({"type": 5}, set()),
        (None, set()),
    ],
    ids=range(8),
)
def test_the_types_that_a_schema_allows(schema: Any, types: set[str]) -> None:
    assert types_of(schema) == types
