"""Builds the job of a validated request: its choices with their parameters, and how its answer
begins."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.api.answer_plan import AnswerPlan
from gateway.api.job import Job
from gateway.api.requests import ChoiceSize, RequestOptions, check_num_logprobs
from gateway.api.responses import Header
from gateway.api.resumption import Stream
from gateway.api.scheduling import RequestScheduling
from gateway.choice_reader import PromptTask
from gateway.prompt import Prompt
from gateway.served_model import ModelLimits, ServedModel
from gateway.stream_position import ChoicePosition
from shared.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class JobBuilder:
    """`logprobs_max` limits the log-probabilities of one request."""

    clock: Clock
    logprobs_max: int

    def build(
        self,
        served: ServedModel,
        options: RequestOptions,
        prompts: Sequence[Prompt],
        limits: ModelLimits,
        scheduling: RequestScheduling,
        *,
        plan: AnswerPlan | None = None,
        stream: Stream | None = None,
        names_seed: bool = False,
    ) -> Job:
        """`plan` is a chat's. `names_seed`: the client has given no seed, and the first event of a
        stream tells which one was taken. Raises RequestError."""
        tasks = [
            PromptTask(
                prompt=prompt.ids,
                sent=prompt.sent,
                sampling=options.sampling_for(len(prompt.ids), limits, choice),
                scheduling=scheduling.params,
                expires_at=scheduling.expires_at,
                stops=options.stops,
                echo=options.echo,
                include_stop=options.include_stop,
                stream_key=b"" if stream is None else stream.keys[number],
                read=ChoicePosition() if stream is None else stream.position_of(number),
            )
            for number, (prompt, choice) in enumerate(
                (prompt, choice) for prompt in prompts for choice in range(options.num_choices)
            )
        ]
        sizes = [ChoiceSize(len(task.prompt), task.sampling.max_tokens) for task in tasks]
        check_num_logprobs(options, sizes, self.logprobs_max)
        return Job(
            header=self._header(served, stream, chat=plan is not None),
            options=options,
            tasks=tasks,
            names=served.token_names(
                with_special=options.include_special, parsed=plan is not None and plan.is_parsed
            ),
            num_prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            plan=plan,
            stream=stream,
            named_seed=options.sampling.seed if names_seed and options.stream else None,
        )

    def _header(self, served: ServedModel, stream: Stream | None, *, chat: bool) -> Header:
        answer_id = uuid.uuid4().hex if stream is None else stream.answer_id
        return Header(
            id=("chatcmpl-" if chat else "cmpl-") + answer_id,
            created=int(self.clock.wall()) if stream is None else stream.created,
            model=served.name,
            fingerprint=served.fingerprint,
            chat=chat,
        )
