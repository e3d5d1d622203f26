"""A validated request, ready to be generated and answered."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.choices import ChoiceWriter
from gateway.api.logprobs import PromptLogprobs
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
        writers: list[ChoiceWriter] = []
        of_prompt: PromptLogprobs | None = None
        num_top = self.options.prompt_logprobs
        for index, task in enumerate(self.tasks):
            is_first = index % self.options.num_choices == 0
            if is_first and num_top is not None:
                of_prompt = PromptLogprobs(self.names, task.prompt, num_top)
            writers.append(
                ChoiceWriter(
                    self.options,
                    task,
                    self.names,
                    chat=self.header.chat,
                    of_prompt=of_prompt,
                    is_first=is_first,
                )
            )
        return writers

    def usage(self, generation: Generation) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=generation.num_cached,
            completion_tokens=generation.num_generated,
        )
