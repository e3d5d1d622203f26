"""instructor: answers as Pydantic models, by JSON schema and by forced calls, several at once, and
asked for once more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import instructor
import openai
import pytest
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel, Field, create_model, field_validator
from served import COMPARE, QUESTION, STAR_TOOLS, Served


class Arms(BaseModel):
    arms: int = Field(ge=0, le=9)
    alive: bool


def client(served: Served, mode: instructor.Mode, **options: Any) -> Any:
    fields = {"base_url": served.api, "api_key": served.key, "max_retries": 0}
    return instructor.from_openai(openai.OpenAI(**{**fields, **options}), mode=mode)


MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS]


@pytest.mark.parametrize("mode", MODES)
def test_the_first_answer_is_the_model_asked_for(served: Served, mode: instructor.Mode) -> None:
    arms = client(served, mode).chat.completions.create(
        model=served.model, messages=QUESTION, response_model=Arms, max_tokens=120, max_retries=0
    )
    assert isinstance(arms, Arms)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_a_partial_model_grows(served: Served, mode: instructor.Mode) -> None:
    parts = list(
        client(served, mode).chat.completions.create_partial(
            model=served.model, messages=QUESTION, response_model=Arms, max_tokens=120
        )
    )
    assert len(parts) > 1
    assert parts[-1].arms in range(10)
    assert parts[-1].alive in (True, False)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_that_is_not_liked_is_asked_for_once_more(
    served: Served, mode: instructor.Mode
) -> None:
    """The call, and as its result what is wrong with it, are in the next request."""
    refused = []

    class Liked(BaseModel):
        arms: int = Field(ge=0, le=9)

        @field_validator("arms")
        @classmethod
        def like(cls, arms: int) -> int:
            if not refused:
                refused.append(arms)
                raise ValueError("once more")
            return arms

    liked = client(served, mode).chat.completions.create(
        model=served.model, messages=QUESTION, response_model=Liked, max_tokens=120, max_retries=2
    )
    assert isinstance(liked, Liked)
    assert len(refused) == 1


def test_models_that_come_at_once(served: Served) -> None:
    star = create_model("colour", __doc__="The colour of a star.", star=(str, ...))
    both = create_model("compare", first=(str, ...), second=(str, ...))
    assert {each.__name__ for each in (star, both)} == set(STAR_TOOLS)
    where = {"base_url": served.agent_api, "api_key": "none"}
    models = client(served, instructor.Mode.PARALLEL_TOOLS, **where).chat.completions.create(
        model=served.scripted_model,
        messages=[{"role": "user", "content": COMPARE}],
        response_model=Iterable[star | both],  # type: ignore[valid-type]
    )
    assert [model.star for model in models] == ["Vega", "Mira 🌟"]


def test_errors_name_the_status(served: Served) -> None:
    wrong = client(served, instructor.Mode.TOOLS, api_key="wrong")
    with pytest.raises((openai.AuthenticationError, InstructorRetryException), match="401"):
        wrong.chat.completions.create(
            model=served.model, messages=QUESTION, response_model=Arms, max_retries=0
        )


def test_a_429_is_retried(served: Served) -> None:
    narrow = client(served, instructor.Mode.TOOLS, api_key=served.narrow_key, max_retries=5)
    with served.busy_until_refused():
        narrow.chat.completions.create(
            model=served.model,
            messages=QUESTION,
            response_model=Arms,
            max_tokens=120,
            max_retries=0,
        )
