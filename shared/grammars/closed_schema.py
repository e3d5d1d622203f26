"""What a client's JSON schema leaves open is closed: an object that names its properties has no
others, unless the schema opens it, and there is little white space. JSON Schema's own defaults make
a model invent keys, or leave lines empty, until it is cut off. Pure."""

from __future__ import annotations

from typing import Any

JSON_SPACE = r"(\n[ \t]{0,32}| )?"
"""Allowed between the tokens of JSON unless the client or the gateway's flags say something else: a
space, or a new line with an indent. A weak model may never leave unlimited white space."""
NO_SPACE = ""

_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_ONE_SCHEMA = ("items", "additionalItems", "contains", "not", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COMBINES = ("allOf", "anyOf", "oneOf", "if", "$ref")


def space_options(space: str) -> dict[str, Any]:
    """Options of llguidance. `space` is the regular expression of the white space between the
    tokens of JSON."""
    return {"whitespace_pattern": space} if space else {"whitespace_flexible": False}


def close_objects(schema: Any) -> Any:
    """A copy. An object schema is closed if it has `properties` and none of `additionalProperties`,
    `patternProperties`, `unevaluatedProperties`. Where several schemas describe one object (allOf;
    properties beside anyOf, oneOf, if or $ref), it is closed to the properties of all of them, and
    stays open if one of them opens it."""
    return _Closer(schema).close(schema)


class _Closer:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._parts: set[str] = set()  # definitions that are only a part of some object
        self._collect_parts(root)

    def close(self, schema: Any, *, is_part: bool = False) -> Any:
        """`is_part`: others describe the same object, and whoever combines them closes it."""
        if isinstance(schema, list):
            return [self.close(each) for each in schema]
        if not isinstance(schema, dict):
            return schema
        combines = self._combines(schema)
        closed = {
            key: self._close_under(key, value, is_part=is_part or combines)
            for key, value in schema.items()
        }
        if is_part or any(key in schema for key in _OPENERS):
            return closed
        if not combines:
            if isinstance(schema.get("properties"), dict):
                closed["additionalProperties"] = False
            return closed
        names = self._names(schema, frozenset())
        if names:
            only = {"properties": dict.fromkeys(sorted(names), True), "additionalProperties": False}
            closed["allOf"] = [*closed.get("allOf", []), only]
        return closed

    def _close_under(self, key: str, value: Any, *, is_part: bool) -> Any:
        if key in _NAMED and isinstance(value, dict):
            is_definition = key in ("$defs", "definitions")
            return {
                name: self.close(each, is_part=is_definition and f"#/{key}/{name}" in self._parts)
                for name, each in value.items()
            }
        if key in _ONE_SCHEMA or (key in _OPENERS and isinstance(value, dict)):
            return self.close(value, is_part=is_part and key in ("if", "then", "else", "not"))
        if key in _LISTS and isinstance(value, list):
            return [self.close(each, is_part=is_part and key != "prefixItems") for each in value]
        return value

    def _combines(self, schema: dict[str, Any]) -> bool:
        """Whether several schemas describe this very object."""
        if "allOf" in schema or schema.get("$ref") in self._parts:
            return True
        return "properties" in schema and any(key in schema for key in _COMBINES)

    def _names(self, schema: Any, seen: frozenset[str]) -> set[str] | None:
        """The properties that any of the combined schemas names; None if one of them opens the
        object."""
        if not isinstance(schema, dict):
            return set()
        if any(key in schema for key in _OPENERS):
            return None
        names = set(schema.get("properties") or ())
        parts = [part for key in ("allOf", "anyOf", "oneOf") for part in schema.get(key) or ()]
        parts += [schema[key] for key in ("if", "then", "else") if key in schema]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen = seen | {reference}
            parts.append(self._target(reference))
        for part in parts:
            found = self._names(part, seen)
            if found is None:
                return None
            names |= found
        return names

    def _target(self, reference: str) -> Any:
        found = self._root
        for step in reference.removeprefix("#").strip("/").split("/"):
            if step:
                found = found.get(step) if isinstance(found, dict) else None
        return found

    def _collect_parts(self, schema: Any) -> None:
        if isinstance(schema, list):
            for each in schema:
                self._collect_parts(each)
        elif isinstance(schema, dict):
            if "allOf" in schema or ("properties" in schema and "$ref" in schema):
                self._parts |= _references(schema)
            for value in schema.values():
                self._collect_parts(value)


def _references(schema: dict[str, Any]) -> set[str]:
    """What the schema itself and the members of its combinators refer to."""
    found = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set()
    for key in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(key) or ():
            if isinstance(part, dict):
                found |= _references(part)
    return found
