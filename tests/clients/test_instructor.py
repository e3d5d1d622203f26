"""instructor: answers as Pydantic models, by JSON schema and by a forced call."""

from __future__ import annotations

from typing import Any

import instructor
import openai
import pytest
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel, Field
from served import QUESTION, Served


class Arms(BaseModel):
    arms: int = Field(ge=0, le=9)
    alive: bool


def client(served: Served, mode: instructor.Mode, **options: Any) -> Any:
    fields = {"base_url": served.api, "api_key": served.key, "max_retries": 0}
    return instructor.from_openai(openai.OpenAI(**{**fields, **options}), mode=mode)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
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
