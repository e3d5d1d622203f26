"""What a client's JSON schema leaves open is closed: an object that names its properties has no
others, unless the schema opens it, and there is little white space. JSON Schema's own defaults make
a model invent keys, or leave lines empty, until it is cut off. Pure."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from shared.errors import GrammarError

JSON_SPACE = r"(\n[ \t]{0,32}| )?"
"""Allowed between the tokens of JSON unless the client or the gateway's flags say something else: a
space, or a new line with an indent. A weak model may never leave unlimited white space."""
NO_SPACE = ""

_OPENERS = ("additionalProperties", "patternProperties", "unevaluatedProperties")
_ONE_SCHEMA = ("items", "additionalItems", "contains", "not", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COMBINES = ("allOf", "anyOf", "oneOf", "if", "$ref")
_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_CONDITIONAL = ("if", "then", "else")

WORK_MAX = 20_000
"""Parts and properties that are looked at to close a schema: some tens of milliseconds."""


def space_options(space: str) -> dict[str, Any]:
    """Options of llguidance. `space` is the regular expression of the white space between the
    tokens of JSON."""
    return {"whitespace_pattern": space} if space else {"whitespace_flexible": False}


def close_objects(schema: Any) -> Any:
    """A copy. An object schema is closed if it has `properties` and none of `additionalProperties`,
    `patternProperties`, `unevaluatedProperties`. Where several schemas describe one object (allOf;
    properties beside anyOf, oneOf, if or $ref), it is closed to the properties of all of them, and
    stays open if one of them opens it. What is no JSON schema is left as it is, for the compiler to
    refuse. Raises GrammarError if its parts refer to each other too often to be followed."""
    return _Closer(schema).close(schema)


class _Closer:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._parts: set[str] = set()  # definitions that are only a part of some object
        self._work_left = WORK_MAX
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
        names, others = self._names(schema), closed.get("allOf", [])
        if names and isinstance(others, list):
            only = {"properties": dict.fromkeys(sorted(names), True), "additionalProperties": False}
            closed["allOf"] = [*others, only]
        return closed

    def _close_under(self, key: str, value: Any, *, is_part: bool) -> Any:
        if key in _NAMED and isinstance(value, dict):
            is_definition = key in ("$defs", "definitions")
            return {
                name: self.close(each, is_part=is_definition and _pointer(key, name) in self._parts)
                for name, each in value.items()
            }
        if key in _ONE_SCHEMA or (key in _OPENERS and isinstance(value, dict)):
            return self.close(value, is_part=is_part and key in (*_CONDITIONAL, "not"))
        if key in _LISTS and isinstance(value, list):
            return [self.close(each, is_part=is_part and key != "prefixItems") for each in value]
        return value

    def _combines(self, schema: dict[str, Any]) -> bool:
        """Whether several schemas describe this very object."""
        if "allOf" in schema or _reference(schema) in self._parts:
            return True
        return "properties" in schema and any(key in schema for key in _COMBINES)

    def _names(self, schema: dict[str, Any]) -> set[str] | None:
        """The properties that any of the combined schemas names; None if one of them opens the
        object."""
        names: set[str] = set()
        followed: set[str] = set()
        left: list[Any] = [schema]
        while left:
            part = left.pop()
            if not isinstance(part, dict):
                continue
            if any(key in part for key in _OPENERS):
                return None
            own = part.get("properties")
            if isinstance(own, dict):
                names.update(own)
            self._spend(1 + (len(own) if isinstance(own, dict) else 0))
            left += [each for key in _ALTERNATIVES for each in _list(part.get(key))]
            left += [part[key] for key in _CONDITIONAL if key in part]
            reference = _reference(part)
            if reference and reference not in followed:
                followed.add(reference)
                left.append(self._target(reference))
        return names

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise GrammarError("its parts refer to each other too often")

    def _target(self, reference: str) -> Any:
        found = self._root
        for step in reference.removeprefix("#").strip("/").split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif name:
                found = found.get(name) if isinstance(found, dict) else None
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
    found = {_reference(schema)} - {""}
    for key in _ALTERNATIVES:
        for part in _list(schema.get(key)):
            if isinstance(part, dict):
                found |= _references(part)
    return found


def _reference(schema: dict[str, Any]) -> str:
    """Empty if it refers to nothing."""
    reference = schema.get("$ref")
    return unquote(reference) if isinstance(reference, str) else ""


def _pointer(*names: str) -> str:
    """As a reference spells it."""
    return "#" + "".join("/" + name.replace("~", "~0").replace("/", "~1") for name in names)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
