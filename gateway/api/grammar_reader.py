"""The grammar that a request's ranks follow: reads the form that it demands and has it checked
against the served model's tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gateway.api.bodies import GenerationBody
from gateway.api.guided import (
    DemandedForm,
    GrammarLimits,
    check_schemas,
    read_form,
    read_json_space,
)
from gateway.grammar_checker import GrammarChecker
from gateway.served_model import ServedModel
from shared.errors import GrammarError, RequestError
from shared.grammars.closed_schema import JSON_SPACE
from shared.grammars.messages import GrammarBudget, GrammarKind

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
"""In a grammar that the client has not written."""


class GrammarReader:
    """On the event loop, which it never holds up: it compares sizes, and a child does the rest."""

    def __init__(
        self, limits: GrammarLimits, budget: GrammarBudget, *, json_space: str = JSON_SPACE
    ) -> None:
        """`json_space` is the white space that answers in JSON may have, as a regular expression,
        unless a request says it."""
        self._limits = limits
        self._budget = budget
        self._json_space = json_space
        self._checker: GrammarChecker | None = None  # a gateway serves one model all its life

    def form_of(self, body: GenerationBody) -> DemandedForm | None:
        """What the request demands, not checked yet. Raises RequestError."""
        return read_form(body, self._limits, json_space=self._json_space)

    def json_space_of(self, body: GenerationBody) -> str:
        """The white space of guided JSON in the answer. Raises RequestError."""
        return read_json_space(body, self._limits, self._json_space)

    def check_schemas(self, param: str, schemas: Sequence[Any]) -> None:
        """Raises RequestError if they are too large to be read."""
        check_schemas(param, schemas, self._limits)

    async def check(self, form: DemandedForm, served: ServedModel) -> str:
        """The grammar that ranks follow. Raises RequestError, Overloaded, Unavailable."""
        if self._checker is None:
            self._checker = GrammarChecker(served.tokenizer_file, self._budget)
        try:
            return await self._checker.check(form.kind, form.text, json_space=form.json_space)
        except GrammarError as error:
            if form.kind is GrammarKind.LLGUIDANCE:
                error = GrammarError(_PLACE.sub("", str(error)))
            raise unusable_grammar(form.param, error) from error

    def close(self) -> None:
        if self._checker is not None:
            self._checker.close()


def unusable_grammar(param: str, error: GrammarError) -> RequestError:
    return RequestError(
        f"{param} is not a usable grammar: {error}", param=param, code="invalid_grammar"
    )
