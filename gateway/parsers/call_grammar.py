"""Grammars (Lark, as llguidance reads it) of answers that a parser will read: calls whose arguments
follow the tools' schemas, after reasoning if there is any. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.parsers import harmony, json_formats
from gateway.parsers.formats import HARMONY, ReasoningFormat, ToolFormat
from gateway.parsers.typed_arguments import Schema
from shared.grammars.closed_schema import JSON_SPACE, close_objects, space_options
from shared.grammars.exact_numbers import exact_numbers

TokenOf = Callable[[str], int | None]
"""The id of the added token with this text, if the tokenizer has one."""

ANSWER = "answer"
"""Name of the grammar that a request's own form becomes inside another one."""

_TEXT = r"/(?s:.*)/"
_SPACE = r"/[ \n]{0,2}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class _CallText:
    """The texts around the names and arguments of calls."""

    begin: str = ""
    before_name: str
    after_name: str
    after_arguments: str
    between: str = ""
    end: str = ""


_HERMES = _CallText(
    before_name=json_formats.TOOL_CALL + '\n{"name": "',
    after_name='", "arguments": ',
    after_arguments="}\n" + json_formats.TOOL_CALL_END,
    between="\n",
)
_CALL_TEXTS: Mapping[str, _CallText] = {
    "hermes": _HERMES,
    "mistral": _CallText(
        begin=json_formats.TOOL_CALLS + "[",
        before_name='{"name": "',
        after_name='", "arguments": ',
        after_arguments="}",
        between=", ",
        end="]",
    ),
    "deepseek_v3": _CallText(
        begin=json_formats.CALLS_BEGIN,
        before_name=json_formats.CALL_BEGIN + "function" + json_formats.SEPARATOR,
        after_name="\n" + json_formats.FENCE,
        after_arguments=json_formats.FENCE_END,
        between="\n",
        end=json_formats.CALLS_END,
    ),
    "deepseek_v31": _CallText(
        begin=json_formats.CALLS_BEGIN,
        before_name=json_formats.CALL_BEGIN,
        after_name=json_formats.SEPARATOR,
        after_arguments=json_formats.CALL_END,
        end=json_formats.CALLS_END,
    ),
    # Its calls end the turn: `<|call|>` is one of the model's end tokens.
    HARMONY: _CallText(
        before_name=harmony.CHANNEL + "commentary to=" + harmony.FUNCTIONS,
        after_name=" " + harmony.CONSTRAIN + "json" + harmony.MESSAGE,
        after_arguments="",
    ),
}


class CallGrammar:
    """Writes the rules for one model."""

    def __init__(
        self, token_of: TokenOf, markers: frozenset[str], *, json_space: str = JSON_SPACE
    ) -> None:
        """`json_space` is the white space in arguments, as a regular expression."""
        self._token_of = token_of
        self._json_space = json_space
        present = sorted((m for m in markers if token_of(m) is not None), key=len, reverse=True)
        self._markers = re.compile("(" + ("|".join(map(re.escape, present)) or "(?!)") + ")")

    def calls(self, tools: ToolFormat, schemas: Mapping[str, Schema], *, calls_max: int) -> str:
        """The rule `calls`: one to `calls_max` calls of these tools. Raises GrammarError as
        `close_objects` and `exact_numbers` do."""
        text = _CALL_TEXTS[tools.guided]
        most = 1 if tools.guided == HARMONY else calls_max
        more = "" if most == 1 else f" ({self._text(text.between)} call){{0,{most - 1}}}"
        names = [f"call{number}" for number in range(len(schemas))]
        rules = [
            f"calls: {self._text(text.begin)} call{more} {self._text(text.end)}",
            f"call: {' | '.join(names)}",
        ]
        for number, (name, schema) in enumerate(schemas.items()):
            before = self._text(text.before_name + name + text.after_name)
            after = self._text(text.after_arguments)
            rules.append(f"call{number}: {before} arguments{number} {after}")
            rules.append(f"arguments{number}: %json {self._json(schema)}")
        return "\n".join(rules)

    def reasoning(self, form: ReasoningFormat | None, *, opened: bool | None) -> str:
        """The rule `reasoning`: what may or must come before the answer."""
        if form is None or opened is False:
            return 'reasoning: ""'
        if self._token_of(form.end) is not None:
            thought = f"thought: {_TEXT} {self._text(form.end)}"
        else:
            thought = f"thought[suffix={json.dumps(form.end)}]: {_TEXT}"
        start = self._text(form.start)
        if form.is_harmony:
            next_start = self._text(harmony.START + "assistant")
            return f"reasoning: ({start} thought {next_start})?\n{thought}"
        if opened or form.implicit:
            return f"reasoning: thought {_SPACE}\n{thought}"
        return f"reasoning: ({start} thought {_SPACE})?\n{thought}"

    def answer(self, form: ReasoningFormat | None) -> str:
        """What comes before an answer that follows a form of its own."""
        if form is not None and form.is_harmony:
            return self._text(harmony.CHANNEL + "final" + harmony.MESSAGE)
        return ""

    def _json(self, schema: Schema) -> str:
        """As a demanded schema."""
        options = space_options(self._json_space)
        return json.dumps({**close_objects(exact_numbers(schema)), "x-guidance": options})

    def _text(self, text: str) -> str:
        """A text as Lark, in which the model's own tokens are tokens."""
        parts = [part for part in self._markers.split(text) if part]
        return " ".join(self._part(part) for part in parts) or '""'

    def _part(self, part: str) -> str:
        token = self._token_of(part) if self._markers.fullmatch(part) else None
        return json.dumps(part, ensure_ascii=False) if token is None else f"<[{token}]>"


def joined(start: str, *rules: str) -> str:
    return "\n".join((f"start: {start}", *rules))


def around(lark: str, own: str) -> str:
    """`lark` refers to the grammar `own`, of llguidance, as `@answer`."""
    is_json = own.lstrip().startswith("{")
    first, *others = json.loads(own)["grammars"] if is_json else [{"lark_grammar": own}]
    named = {**first, "name": ANSWER}
    return json.dumps({"grammars": [{"lark_grammar": lark}, named, *others]})
