"""A number that a schema demands comes with its value, or the schema is refused by that number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.parsers.call_grammar import CallGrammar
from gateway.parsers.formats import TOOL_FORMATS
from shared.errors import GrammarError
from shared.grammars.compiler import GrammarCompiler
from shared.grammars.exact_numbers import BOUND_MAX, exact_numbers
from shared.grammars.messages import GrammarKind
from shared.grammars.sources import grammar_of

FILE = Path(__file__).parents[4] / "models" / "starling-14m" / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(FILE))
GRAMMARS = GrammarCompiler(FILE, eos_token_ids=(2,))


def number_of(schema: Any) -> Any:
    """Of an answer to it, always by the last token that is allowed."""
    matcher = GRAMMARS.open(grammar_of(GrammarKind.JSON_SCHEMA, json.dumps(schema)), ())
    ids: list[int] = []
    while len(ids) < 100:
        bits = int.from_bytes(matcher.bits(), "little")
        if bits >> 2 & 1:
            break
        ids.append(bits.bit_length() - 1)
        matcher.accept(ids[-1:])
    return json.loads(TOKENIZER.decode(ids))


def refusal(schema: Any) -> str:
    """Empty if the schema is not refused."""
    try:
        exact_numbers(schema)
    except GrammarError as error:
        return str(error)
    return ""


INTEGERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-3, 3).flatmap(
        lambda near: st.sampled_from([2**53, -(2**53), 2**54, 2**63, -(2**63), 2**64, 10**20]).map(
            lambda base: base + near
        )
    ),
)


@settings(max_examples=60, deadline=None)
@given(number=INTEGERS)
def test_an_integer_comes_as_it_is_or_is_refused_by_name(number: int) -> None:
    for schema in ({"const": number}, {"enum": [number]}, {"minimum": number, "maximum": number}):
        why = refusal(schema)
        if why:
            assert str(number) in why
            assert abs(number) > 2**53
        else:
            assert number_of({"type": "integer", **schema}) == number


@settings(max_examples=40, deadline=None)
@given(low=INTEGERS, high=INTEGERS)
def test_a_number_is_within_its_bounds(low: int, high: int) -> None:
    try:
        found = number_of({"type": "integer", "minimum": low, "maximum": high})
    except GrammarError:
        assert low > high or max(abs(low), abs(high)) > 2**53
    else:
        assert low <= found <= high


@pytest.mark.parametrize(
    ("schema", "number"),
    [
        ({"const": 9007199254740993}, "9007199254740993"),
        (
            {"enum": ["a", {"b": [123456789012345678901234567890]}]},
            "123456789012345678901234567890",
        ),
        ({"const": 2**63}, "9223372036854775808"),
        ({"const": 10**20}, "100000000000000000000"),
        ({"const": 1e300}, "1e+300"),
        ({"const": 10**5000}, "0x"),
        ({"exclusiveMinimum": 2**63}, "9223372036854775808"),
        ({"maximum": -(10**30)}, "-1" + "0" * 30),
        ({"minimum": 1e19}, "1e+19"),
        ({"multipleOf": 2**53 + 1}, "9007199254740993"),
    ],
)
def test_what_would_be_another_number_is_refused_wherever_it_is(schema: Any, number: str) -> None:
    for outer in (
        schema,
        {"properties": {"const": schema}},
        {"items": schema},
        {"anyOf": [{"type": "null"}, schema]},
        {"$defs": {"maximum": schema}},
        {"additionalProperties": schema},
    ):
        with pytest.raises(GrammarError, match="strings") as refused:
            exact_numbers(outer)
        assert str(refused.value).startswith(number)
    with pytest.raises(GrammarError, match="strings"):
        CallGrammar({}.get, frozenset()).calls(
            TOOL_FORMATS["hermes"], {"f": {"properties": {"x": schema}}}, calls_max=1
        )


def test_bounds_beyond_64_bits_stay_within_them_and_all_else_stays() -> None:
    wide = {"minimum": -(2**63), "maximum": 2**63 - 1, "exclusiveMaximum": 2**64}
    most = {"minimum": -BOUND_MAX, "maximum": BOUND_MAX, "exclusiveMaximum": BOUND_MAX}
    assert exact_numbers({"items": wide}) == {"items": most}
    assert -BOUND_MAX <= number_of({"type": "integer", **wide}) < 2**63
    kept = {
        "default": 2**53 + 1,
        "examples": [2**64],
        "exclusiveMaximum": True,
        "properties": {"maximum": {"const": 1e18, "minimum": -0.5}},
        "enum": [None, True, "9007199254740993", 2**53, 10**18, -(2**60)],
        "minLength": 3,
        "multipleOf": 0.25,
    }
    assert exact_numbers(kept) == kept
