"""What a request demands of the form of its answer (a JSON schema, a regular expression, a choice,
a grammar), as one grammar of llguidance's for the rank."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, grammar_from

from gateway.api.bodies import GenerationBody
from shared.errors import RequestError

GRAMMAR_CHARS_MAX = 256 * 1024

_JSON_SPACE = r"(\n[ \t]{0,32}| )?"
"""Between the tokens of JSON: a space, or a new line and an indent. Unbounded space is where weak
models get lost."""

_STRUCTURED = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}
"""Fields of `structured_outputs`, and the request's own fields that mean the same."""

FIELDS = ("response_format", "structured_outputs", *_STRUCTURED.values())


def asks_for_grammar(body: GenerationBody) -> bool:
    return any(getattr(body, name) is not None for name in FIELDS)


def read_grammar(body: GenerationBody) -> str:
    """Empty where the form is free. May take a second of CPU for a huge grammar (the library
    releases the GIL): call it off the event loop. Raises RequestError."""
    demands = _demands(body)
    if not demands:
        return ""
    if len(demands) > 1:
        names = " and ".join(param for param, _, _ in demands)
        raise RequestError(f"{names} exclude each other; keep one", param=demands[1][0])
    param, kind, value = demands[0]
    grammar = _grammar(param, kind, value)
    if len(grammar) > GRAMMAR_CHARS_MAX:
        raise RequestError(f"{param} is longer than {GRAMMAR_CHARS_MAX} characters", param=param)
    error = LLMatcher.validate_grammar(grammar)
    if error and not error.startswith("WARNING"):
        raise RequestError(f"{param} cannot be followed: {error.strip()[:500]}", param=param)
    return grammar


def _demands(body: GenerationBody) -> list[tuple[str, str, Any]]:
    """(field, kind, value) of everything that is asked for."""
    demands = [
        (name, kind, value)
        for kind, name in _STRUCTURED.items()
        if (value := getattr(body, name)) is not None
    ]
    if body.structured_outputs is not None:
        demands += _structured_outputs(body.structured_outputs)
    if body.response_format is not None:
        demands += _response_format(body.response_format)
    return demands


def _structured_outputs(value: Any) -> list[tuple[str, str, Any]]:
    param = "structured_outputs"
    if not isinstance(value, dict):
        raise RequestError(f"{param} must be an object", param=param)
    wanted = {kind: demand for kind, demand in value.items() if demand not in (None, False)}
    demands: list[tuple[str, str, Any]] = []
    for kind, demand in wanted.items():
        if kind == "json_object":
            demands.append((param, "json", {"type": "object"}))
        elif kind in _STRUCTURED:
            demands.append((param, kind, demand))
        else:
            raise RequestError(
                f"{param} knows json, json_object, regex, choice and grammar, not {kind!r:.60}",
                param=param,
            )
    return demands


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
            raise RequestError(f"{param} must be a list of texts", param=param)
        return _from("choice", json.dumps(value), param)
    if kind == "json":
        return _from_schema(value, param)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{param} must be a text", param=param)
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
