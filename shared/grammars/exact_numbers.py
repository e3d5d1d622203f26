"""Keeps the numbers of a schema exact. llguidance computes with floats and 64-bit integers, so it
would give another number for a large one without a word. Pure."""

from __future__ import annotations

from typing import Any

from shared.errors import GrammarError

BOUND_MAX = 2**63 - 1024
"""The largest integer of 64 bits that is a float, too. What is allowed beyond it does not come."""

_SCHEMAS_BY_NAME = (
    *("properties", "patternProperties", "$defs", "definitions"),
    *("dependentSchemas", "dependencies"),
)
_UPPER = ("maximum", "exclusiveMaximum")
_LOWER = ("minimum", "exclusiveMinimum")
_VALUES = ("const", "enum")
_NOTES = ("default", "examples", "example")
_DIGITS_MAX = 40  # of a number in an error


def exact_numbers(schema: Any) -> Any:
    """A copy whose bounds are within 64 bits. Raises GrammarError, which names the number, if one
    of its constants or bounds, or `multipleOf`, would become another number."""
    if isinstance(schema, list):
        return [exact_numbers(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _exact(key, value) for key, value in schema.items()}


def _exact(key: str, value: Any) -> Any:
    if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
        return {name: exact_numbers(each) for name, each in value.items()}
    if key in _VALUES:
        _check_constants(value)
        return value
    if key in _NOTES:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return exact_numbers(value)
    if key in _UPPER:
        return -_lower_bound(-value, value)
    if key in _LOWER:
        return _lower_bound(value, value)
    if key == "multipleOf" and isinstance(value, int) and value >= 1 << 32:
        raise _refusal(value, "too large for multipleOf")
    return value


def _lower_bound(bound: float, shown: float) -> float:
    """Of numbers, or of their negatives: `shown` is as the schema has it. An infinite float is what
    JSON has no spelling for."""
    if bound < -BOUND_MAX:
        return -BOUND_MAX
    if bound > BOUND_MAX or (isinstance(bound, int) and int(float(bound)) != bound):
        raise _refusal(shown, "a bound that is too large to be exact")
    return bound


def _check_constants(value: Any) -> None:
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict | list):
            left += each.values() if isinstance(each, dict) else each
        elif isinstance(each, int | float) and not _is_exact(each):
            raise _refusal(each, "too large to be exact")


def _is_exact(number: float) -> bool:
    """Whether the library writes it with the same value, whatever type stands beside it."""
    if abs(number) > BOUND_MAX:
        return False
    return isinstance(number, float) or int(float(number)) == number


def _refusal(number: float, why: str) -> GrammarError:
    digits = repr(number) if isinstance(number, float) else _digits(number)
    shown = digits if len(digits) <= _DIGITS_MAX else digits[:_DIGITS_MAX] + "…"
    return GrammarError(f"{shown} is {why}; pass such numbers as strings")


def _digits(number: int) -> str:
    """An integer of a body may have more digits than Python converts."""
    return str(number) if number.bit_length() < 1 << 10 else hex(number)
