"""The grammar that an answer follows: the form that its request demands, calls of tools, and the
reasoning before them."""

from __future__ import annotations

from gateway.api.answer_plan import AnswerPlan
from gateway.api.bodies import GenerationBody
from gateway.api.grammar_reader import GrammarReader, unusable_grammar
from gateway.api.guided import DemandedForm
from gateway.served_model import ServedModel
from shared.errors import GrammarError, RequestError
from shared.grammars.messages import GrammarKind


async def answer_grammar(
    body: GenerationBody,
    form: DemandedForm | None,
    plan: AnswerPlan | None,
    served: ServedModel,
    reader: GrammarReader,
) -> str:
    """Empty if nothing guides the answer. `form` is what the request demands. Raises RequestError,
    Overloaded, Unavailable."""
    own = grammar = "" if form is None else await reader.check(form, served)
    if plan is not None:
        token_of = served.tokenizer.added_ids.get
        space = reader.json_space_of(body)
        if plan.guides_calls:
            reader.check_schemas("tools", list(plan.tools.schemas.values()))
        try:
            calls = plan.calls_grammar(token_of, json_space=space)
        except GrammarError as error:
            raise unusable_grammar("tools", error) from error
        if calls:
            await reader.check(_built("tools", calls), served)
        grammar = plan.grammar(own, token_of, json_space=space)
        if grammar not in ("", own, calls):
            # Its parts are sound, but ranks compile it as a whole.
            param = "tools" if form is None or calls else form.param
            await reader.check(_built(param, grammar), served)
    if grammar and body.allowed_token_ids is not None:
        raise RequestError(
            "allowed_token_ids does not go with an answer that follows a form",
            param="allowed_token_ids",
        )
    return grammar


def _built(param: str, grammar: str) -> DemandedForm:
    return DemandedForm(param=param, kind=GrammarKind.LLGUIDANCE, text=grammar)
