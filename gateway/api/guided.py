"""Reads the form that a request demands of its answer (a JSON schema, a regular expression, a
choice, a grammar) and turns it into one llguidance grammar for the rank."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, grammar_from

from gateway.api.bodies import GenerationBody
from shared.errors import RequestError

GRAMMAR_CHARS_MAX = 256 * 1024

_JSON_SPACE = r"(\n[ \t]{0,32}| )?"
"""Allowed between the tokens of JSON: a space, or a new line with an indent. A weak model may never
leave unlimited white space."""

_STRUCTURED = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}
"""Field of `structured_outputs` → the request's own field with the same meaning."""

FIELDS = ("response_format", "structured_outputs", *_STRUCTURED.values())


def asks_for_grammar(body: GenerationBody) -> bool:
    return any(getattr(body, name) is not None for name in FIELDS)


def read_grammar(body: GenerationBody) -> str:
    """Returns "" if the request demands no form. A huge grammar may take a second of CPU, during
    which the library releases the GIL: call it off the event loop. Raises RequestError."""
    constraints = _constraints(body)
    if not constraints:
        return ""
    if len(constraints) > 1:
        names = " and ".join(param for param, _, _ in constraints)
        raise RequestError(f"{names} exclude each other; pass only one", param=constraints[1][0])
    param, kind, value = constraints[0]
    grammar = _grammar(param, kind, value)
    check_grammar(grammar, param)
    return grammar


def check_grammar(grammar: str, param: str) -> None:
    """`param` is the field that it was made of. Call it off the event loop. Raises RequestError."""
    if len(grammar) > GRAMMAR_CHARS_MAX:
        raise RequestError(f"{param} is longer than {GRAMMAR_CHARS_MAX} characters", param=param)
    error = LLMatcher.validate_grammar(grammar)
    if error and not error.startswith("WARNING"):
        raise RequestError(f"{param} is not a usable grammar: {error.strip()[:500]}", param=param)


def _constraints(body: GenerationBody) -> list[tuple[str, str, Any]]:
    """(field, kind, value) of each form that the request demands."""
    constraints = [
        (name, kind, value)
        for kind, name in _STRUCTURED.items()
        if (value := getattr(body, name)) is not None
    ]
    if body.structured_outputs is not None:
        constraints += _structured_outputs(body.structured_outputs)
    if body.response_format is not None:
        constraints += _response_format(body.response_format)
    return constraints


def _structured_outputs(value: Any) -> list[tuple[str, str, Any]]:
    param = "structured_outputs"
    if not isinstance(value, dict):
        raise RequestError(f"{param} must be an object", param=param)
    wanted = {
        kind: constraint for kind, constraint in value.items() if constraint not in (None, False)
    }
    constraints: list[tuple[str, str, Any]] = []
    for kind, constraint in wanted.items():
        if kind == "json_object":
            constraints.append((param, "json", {"type": "object"}))
        elif kind in _STRUCTURED:
            constraints.append((param, kind, constraint))
        else:
            raise RequestError(
                f"{param} must be json, json_object, regex, choice or grammar, not {kind!r:.60}",
                param=param,
            )
    return constraints


def _response_format(value: Any) -> list[tuple[str, str, Any]]:
    param = "response_format"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [(param, "json", {"type": "object"})]
    if kind == "json_schema":
        wrapper = value.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        if schema is None:
            raise RequestError(f"{param} lacks json_schema.schema", param=param)
        return [(param, "json", schema)]
    raise RequestError(
        f"{param} must be an object of type text, json_object or json_schema", param=param
    )


def _grammar(param: str, kind: str, value: Any) -> str:
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise RequestError(f"{param} must be a list of strings", param=param)
        return _from("choice", json.dumps(value), param)
    if kind == "json":
        return _from_schema(value, param)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{param} must be a string", param=param)
    return _from(kind, value, param)


def _from_schema(value: Any, param: str) -> str:
    if not isinstance(value, str | dict | bool):
        raise RequestError(f"{param} must be a JSON schema", param=param)
    schema = value if isinstance(value, str) else json.dumps(value)
    try:
        return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": _JSON_SPACE})
    except ValueError as error:
        raise RequestError(f"{param} cannot be read: {error}"[:500], param=param) from error


def _from(kind: str, text: str, param: str) -> str:
    try:
        return grammar_from(kind, text)  # type: ignore[arg-type]
    except ValueError as error:
        raise RequestError(f"{param} cannot be read: {error}"[:500], param=param) from error
