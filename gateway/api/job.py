"""A validated request, ready to be generated and answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.api.answer_plan import AnswerPlan
from gateway.api.answer_reader import AnswerReader
from gateway.api.choices import ChoiceWriter
from gateway.api.logprobs import PromptLogprobs
from gateway.api.requests import RequestOptions
from gateway.api.responses import Header, Usage
from gateway.api.resumption import Stream
from gateway.choice_reader import PromptTask
from gateway.detokenizer import TokenNames
from gateway.generation import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`tasks` are the request's choices, prompt by prompt. `num_prompt_tokens` counts each prompt
    once, however many choices it has. `stream`: its events have ids.
    `named_seed` is what the first event tells."""

    header: Header
    options: RequestOptions
    tasks: list[PromptTask]
    names: TokenNames
    num_prompt_tokens: int
    plan: AnswerPlan | None = None
    stream: Stream | None = None
    named_seed: int | None = None

    @property
    def is_all_read(self) -> bool:
        """Whether the client of a resumed stream has everything but its end."""
        read = None if self.stream is None else self.stream.read
        if read is None:
            return False
        has_ended = bool(read.choices) and all(choice.ended for choice in read.choices)
        return read.all_read or (has_ended and not self.options.include_usage)

    @property
    def is_parsed(self) -> bool:
        """Whether anything may be split off its texts."""
        return self.plan is not None and self.plan.is_parsed

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
                    answer=self._reader(task, index),
                )
            )
        return writers

    def chat_reader(self) -> AnswerReader:
        """Of a chat with one choice."""
        (task,) = self.tasks
        assert self.plan is not None, "every chat has a plan"
        return self.plan.whole_reader(self.names, task.prompt, answer=self.header.id, choice=0)

    def _reader(self, task: PromptTask, index: int) -> AnswerReader | None:
        if self.plan is None:
            return None
        answer = self.header.id
        return self.plan.reader(self.names, task.prompt, answer=answer, choice=index)

    def usage(self, generation: Generation, writers: Sequence[ChoiceWriter] = ()) -> Usage:
        """Of the whole request so far."""
        counts = [writer.num_reasoning_tokens for writer in writers]
        known = [count for count in counts if count is not None]
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=generation.num_cached,
            completion_tokens=generation.num_generated,
            reasoning_tokens=sum(known) if known else None,
        )
