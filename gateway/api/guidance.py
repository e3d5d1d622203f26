"""The grammar that an answer follows: the form that its request demands, calls of tools, and the
reasoning before them."""

from __future__ import annotations

import asyncio

from gateway.api.answer_plan import AnswerPlan
from gateway.api.bodies import GenerationBody
from gateway.api.guided import asks_for_grammar, check_grammar, read_grammar
from gateway.served_model import ServedModel
from shared.errors import RequestError


async def answer_grammar(body: GenerationBody, plan: AnswerPlan | None, served: ServedModel) -> str:
    """Empty if nothing guides the answer. Grammars are read on a thread: a huge one takes long, and
    no other client may wait for it. Raises RequestError."""
    own = await asyncio.to_thread(read_grammar, body) if asks_for_grammar(body) else ""
    grammar = own
    if plan is not None:
        token_of = served.tokenizer.added_ids.get
        calls = plan.calls_grammar(token_of)
        if calls:
            await asyncio.to_thread(check_grammar, calls, "tools")
        grammar = plan.grammar(own, token_of)
    if grammar and body.allowed_token_ids is not None:
        raise RequestError(
            "allowed_token_ids does not go with an answer that follows a form",
            param="allowed_token_ids",
        )
    return grammar
