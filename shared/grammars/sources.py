"""Turns what a client states (a JSON schema, a regular expression, choices, a grammar in Lark or
GBNF) into a grammar of llguidance. Runs in the grammar child: a hostile text may take long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from llguidance import LLMatcher, grammar_from

from shared.errors import GrammarError
from shared.grammars.closed_schema import JSON_SPACE, close_objects, space_options
from shared.grammars.compiler import client_words
from shared.grammars.exact_numbers import exact_numbers
from shared.grammars.messages import GrammarKind
from shared.grammars.spelt_tokens import with_ids

NO_TOKENS: Mapping[str, int] = MappingProxyType({})


def grammar_of(
    kind: GrammarKind,
    text: str,
    *,
    json_space: str = JSON_SPACE,
    special_ids: Mapping[str, int] = NO_TOKENS,
) -> str:
    """`json_space` is the white space that JSON of a schema may have, as a regular expression;
    `special_ids` are the special tokens that a grammar may name. Raises GrammarError if the text
    cannot be read. Whether it can be followed, only the compiler knows."""
    try:
        match kind:
            case GrammarKind.JSON_SCHEMA:
                schema = close_objects(exact_numbers(json.loads(text)))
                schema = {} if schema is True else schema  # any JSON; options need an object
                options = space_options(json_space)
                return LLMatcher.grammar_from_json_schema(json.dumps(schema), options)  # type: ignore[arg-type]
            case GrammarKind.CHOICE:
                # As one lexeme: alternatives of the grammar itself would cost an item each.
                choices = " | ".join(json.dumps(choice) for choice in json.loads(text))
                return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
            case GrammarKind.REGEX:
                return LLMatcher.grammar_from_regex(text)
            case GrammarKind.GRAMMAR:
                return with_ids(grammar_from("grammar", text), special_ids)
            case GrammarKind.LLGUIDANCE:
                return text
    except RecursionError as error:
        raise GrammarError("it is nested too deeply") from error
    except ValueError as error:
        if isinstance(error.__context__, RecursionError):  # of the library's reader of GBNF
            raise GrammarError("it is nested too deeply") from error
        raise GrammarError(f"it cannot be read: {client_words(str(error))}") from error
