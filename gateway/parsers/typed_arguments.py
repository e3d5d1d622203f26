"""Writes the arguments of a call as JSON from the plain texts that XML-like formats use. The tool's
schema says of what type each is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]
"""The JSON schema of a tool's parameters."""
_LEVELS_MAX = 64


class TypedArguments:
    """The pieces that its methods return make one JSON object."""

    def __init__(self, schema: Schema) -> None:
        properties = schema.get("properties")
        self._properties = properties if isinstance(properties, dict) else {}
        self._types: dict[str, set[str]] = {}  # by name: a schema may be long
        self._num_keys = 0

    def key(self, name: str) -> str:
        self._num_keys += 1
        return ("{" if self._num_keys == 1 else ", ") + _text(name) + ": "

    def close(self) -> str:
        return "}" if self._num_keys else "{}"

    def is_text(self, name: str) -> bool:
        """Whether a value can only be a string, so that it can be passed on as it comes."""
        return self._types_of(name) == {"string"}

    def value(self, name: str, text: str) -> str:
        """The text as JSON of one of the types that the schema allows, else as a string."""
        value = _converted(text.strip(), self._types_of(name))
        return _text(text) if value is None else value

    def _types_of(self, name: str) -> set[str]:
        if name not in self._properties:
            return set()
        if name not in self._types:
            self._types[name] = types_of(self._properties[name])
        return self._types[name]


def string_piece(text: str) -> str:
    """A part of a JSON string, without its quotes."""
    return _text(text)[1:-1]


def types_of(schema: Any, *, levels: int = _LEVELS_MAX) -> set[str]:
    """The JSON types that a schema allows; empty if it does not say, or only deeper than so many
    `levels`."""
    if not isinstance(schema, dict) or not levels:
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {each for each in declared if isinstance(each, str)}
    if "const" in schema or "enum" in schema:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
        return {_type_of(value) for value in values}
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            parts = [types_of(part, levels=levels - 1) for part in schema[name]]
            return set().union(*parts) if all(parts) else set()
    return set()


def _converted(text: str, types: set[str]) -> str | None:
    """The JSON of `text`; None if it must be a string."""
    lowered = text.lower()
    if lowered in ("true", "false") and (not types or "boolean" in types):
        return lowered
    if lowered in ("null", "none") and ("null" in types or (not types and lowered == "null")):
        return "null"
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    kind = _type_of(value)
    if kind == "string":  # the quotes belong to the text
        return None
    if kind == "integer" and "integer" not in types and "number" in types:
        kind = "number"
    return text if kind in types or not types else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
