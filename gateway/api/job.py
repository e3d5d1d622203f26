"""A validated request, ready to be generated and answered."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.choices import ChoiceWriter
from gateway.api.requests import RequestOptions
from gateway.api.responses import Header, Usage
from gateway.detokenizer import TokenNames
from gateway.generation import Generation, PromptTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`tasks` are the request's choices, prompt by prompt. `num_prompt_tokens` counts each prompt
    once, however many choices it has."""

    header: Header
    options: RequestOptions
    tasks: list[PromptTask]
    names: TokenNames
    num_prompt_tokens: int

    def choice_writers(self) -> list[ChoiceWriter]:
        chat = self.header.chat
        return [ChoiceWriter(self.options, task, self.names, chat=chat) for task in self.tasks]

    def usage(self, generation: Generation) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=generation.num_cached,
            completion_tokens=generation.num_generated,
        )
