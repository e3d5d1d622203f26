"""Reads the form that a request demands of its answer (a JSON schema, a regular expression, a
choice, a grammar), and bounds its size before anybody parses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from gateway.api.bodies import GenerationBody
from shared.errors import RequestError
from shared.grammars.closed_schema import JSON_SPACE, NO_SPACE
from shared.grammars.messages import GrammarKind

SCHEMA_DEPTH_MAX = 64
CHOICES_MAX = 4096

_STRUCTURED = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}
"""Field of `structured_outputs` → the request's own field with the same meaning."""
_STRUCTURED_OPTIONS = (
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",  # as it is: objects are closed
    "disable_fallback",  # there is one backend
)

RESPONSE_FORMAT = "response_format"
FIELDS = (RESPONSE_FORMAT, "structured_outputs", *_STRUCTURED.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """`bytes_max` bounds the text of a schema, an expression, choices or a grammar;
    `properties_max` the property names of a schema."""

    bytes_max: int
    properties_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandedForm:
    """`param` is the field that demands it. `json_space` is the white space that JSON of a schema
    may have, as a regular expression."""

    param: str
    kind: GrammarKind
    text: str
    json_space: str = JSON_SPACE


def read_form(
    body: GenerationBody, limits: GrammarLimits, *, json_space: str = JSON_SPACE
) -> DemandedForm | None:
    """None if the request demands no form. Whether the form can be followed is not known then.
    `json_space` is what holds if the request does not say it. Raises RequestError."""
    constraints = _constraints(body)
    if not constraints:
        return None
    if len(constraints) > 1:
        names = " and ".join(each.name for each in constraints)
        raise RequestError(f"{names} exclude each other; pass only one", param=constraints[1].param)
    param, kind, value, _ = constraints[0]
    return DemandedForm(
        param=param,
        kind=GrammarKind(kind),
        text=_text(param, kind, value, limits),
        json_space=read_json_space(body, limits, json_space),
    )


def read_json_space(body: GenerationBody, limits: GrammarLimits, default: str) -> str:
    """The white space between the tokens of guided JSON, as a regular expression; `default` if the
    request does not say it. Raises RequestError."""
    param, space = "guided_whitespace_pattern", body.guided_whitespace_pattern
    if isinstance(body.structured_outputs, dict):
        options = body.structured_outputs
        if options.get("disable_any_whitespace"):
            return NO_SPACE
        if options.get("whitespace_pattern") is not None:
            param, space = "structured_outputs", options["whitespace_pattern"]
    if space is None:
        return default
    if not isinstance(space, str):
        raise RequestError(f"{param}: a white space pattern is a regular expression", param=param)
    _check_bytes(param, space, limits)
    return space


class _Constraint(NamedTuple):
    """`name` is that of the field `param`, or of one inside it."""

    param: str
    kind: str
    value: Any
    name: str


def _constraints(body: GenerationBody) -> list[_Constraint]:
    """Of each form that the request demands."""
    constraints = [
        _Constraint(name, kind, value, name)
        for kind, name in _STRUCTURED.items()
        if (value := getattr(body, name)) is not None
    ]
    if body.structured_outputs is not None:
        constraints += _structured_outputs(body.structured_outputs)
    if body.response_format is not None:
        constraints += _response_format(body.response_format)
    return constraints


def _structured_outputs(value: Any) -> list[_Constraint]:
    param = "structured_outputs"
    if not isinstance(value, dict):
        raise RequestError(f"{param} must be an object", param=param)
    wanted = {
        kind: constraint
        for kind, constraint in value.items()
        if constraint not in (None, False) and kind not in _STRUCTURED_OPTIONS
    }
    constraints: list[_Constraint] = []
    for kind, constraint in wanted.items():
        name = f"{param}.{kind}"
        if kind == "json_object":
            constraints.append(_Constraint(param, "json", {"type": "object"}, name))
        elif kind in _STRUCTURED:
            constraints.append(_Constraint(param, kind, constraint, name))
        else:
            raise RequestError(
                f"{param} must be json, json_object, regex, choice or grammar, not {kind!r:.60}",
                param=param,
            )
    return constraints


def _response_format(value: Any) -> list[_Constraint]:
    param = RESPONSE_FORMAT
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [_Constraint(param, "json", {"type": "object"}, param)]
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if schema is None:
            raise RequestError(f"{param} lacks json_schema.schema", param=param)
        return [_Constraint(param, "json", schema, param)]
    raise RequestError(
        f"{param} must be an object of type text, json_object or json_schema", param=param
    )


def _text(param: str, kind: str, value: Any, limits: GrammarLimits) -> str:
    if kind == "json":
        if not isinstance(value, str | dict | bool):
            raise RequestError(f"{param} must be a JSON schema", param=param)
        return _schema_text(param, value, limits)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise RequestError(f"{param} must be a list of strings", param=param)
        if len(value) > CHOICES_MAX:
            raise RequestError(f"{param} has more than {CHOICES_MAX} choices", param=param)
        text = msgspec.json.encode(value).decode()
    elif isinstance(value, str) and value:
        text = value
    else:
        raise RequestError(f"{param} must be a string that is not empty", param=param)
    _check_bytes(param, text, limits)
    return text


def check_schemas(param: str, schemas: Sequence[Any], limits: GrammarLimits) -> None:
    """All of them together are bounded as one schema is. Raises RequestError."""
    _schema_text(param, {"anyOf": list(schemas)}, limits)


def _schema_text(param: str, value: str | bool | dict[str, Any], limits: GrammarLimits) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    _check_bytes(param, text, limits)
    try:
        schema = msgspec.json.decode(text) if isinstance(value, str) else value
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"{param} is not JSON", param=param) from error
    num_properties = 0
    for depth, node in _nodes(schema):
        properties = node.get("properties") if isinstance(node, dict) else None
        num_properties += len(properties) if isinstance(properties, dict) else 0
        if depth > SCHEMA_DEPTH_MAX:
            raise RequestError(
                f"{param} is nested more than {SCHEMA_DEPTH_MAX} levels deep", param=param
            )
        if num_properties > limits.properties_max:
            raise RequestError(
                f"{param} has more than {limits.properties_max} properties", param=param
            )
    return text


def _nodes(schema: Any) -> Iterator[tuple[int, dict[str, Any] | list[Any]]]:
    """Every object and list in it, with its depth. Without recursion, which a client could
    exhaust."""
    left: list[tuple[int, Any]] = [(1, schema)]
    while left:
        depth, node = left.pop()
        if isinstance(node, dict | list):
            yield depth, node
            inner = node.values() if isinstance(node, dict) else node
            left += [(depth + 1, each) for each in inner]


def _check_bytes(param: str, text: str, limits: GrammarLimits) -> None:
    if len(text) > limits.bytes_max or len(text.encode(errors="replace")) > limits.bytes_max:
        raise RequestError(f"{param} is longer than {limits.bytes_max} bytes", param=param)
