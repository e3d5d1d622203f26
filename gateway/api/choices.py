"""Turns the deltas of a choice into its part of an answer or of a stream's chunks."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gateway.api.answer_reader import AnswerReader
from gateway.api.logprobs import (
    CompletionLogprobs,
    PromptLogprobs,
    ScoredToken,
    chat_logprobs,
)
from gateway.api.requests import RequestOptions
from gateway.api.responses import Choice, ChunkWriter
from gateway.choice_reader import Delta, PromptTask
from gateway.detokenizer import TokenNames
from shared.types import FinishReason


class ChoiceWriter:
    """Gets every delta of one choice, in order: through `take` for one body, or `chunks` for a
    stream."""

    def __init__(
        self,
        options: RequestOptions,
        task: PromptTask,
        names: TokenNames,
        *,
        chat: bool,
        of_prompt: PromptLogprobs | None,
        is_first: bool,
        answer: AnswerReader | None = None,
    ) -> None:
        """`of_prompt` is what the request shows of the prompt's log-probabilities; the first choice
        of the prompt brings them. `answer` reads the text of a chat; None: it is all content."""
        self._options = options
        self._prompt = task.prompt
        self._names = names
        self._chat = chat
        self._num_top = task.sampling.logprobs
        self._completion = CompletionLogprobs(
            names,
            task.sampling.logprobs or 0,
            follows=task.hidden_prompt,
            echoed=task.sent if task.echo else None,
        )
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._scored: list[ScoredToken] = []
        self._of_prompt = of_prompt
        self._is_first = is_first
        self._finish = FinishReason.LENGTH
        self._stop: str | int | None = None
        self._answer = answer

    @property
    def num_reasoning_tokens(self) -> int | None:
        """None if its reasoning is not split off."""
        return None if self._answer is None else self._answer.num_reasoning_tokens

    def take(self, delta: Delta) -> None:
        """Collects a delta for `choice`."""
        if self._answer is None:
            self._texts.append(delta.text)
        else:
            self._answer.feed(delta.text, delta.token_ids, delta.finish)
        self._token_ids += delta.token_ids
        self._scored += self._scored_of(delta)
        if self._of_prompt is not None and self._is_first:
            self._of_prompt.add(delta.prompt_logprobs)
        self._finish = delta.finish or self._finish
        self._stop = delta.stop

    async def choice(self) -> Choice:
        """The choices of a prompt are asked in their order."""
        return Choice(
            text="".join(self._texts),
            token_ids=self._token_ids,
            prompt_ids=self._prompt,
            finish_reason=self._finish.value
            if self._answer is None
            else self._answer.finish_reason(self._finish, self._stop),
            message=None if self._answer is None else self._answer.message(),
            stop=self._stop,
            logprobs=await self._shape(self._scored),
            prompt_logprobs=None if self._of_prompt is None else await self._of_prompt.shaped(),
        )

    @property
    def has_logprobs(self) -> bool:
        return self._num_top is not None

    async def logprobs(self, delta: Delta) -> msgspec.Raw | None:
        """Those of a stream's delta, for `chunks`. None if the request asks for none."""
        return await self._shape(self._scored_of(delta))

    def chunks(
        self, delta: Delta, writer: ChunkWriter, logprobs: msgspec.Raw | None
    ) -> list[bytes]:
        """The events of a stream. None for a delta without text (half a character, a held-back stop
        string), unless the delta has something else to say."""
        if self._answer is not None:
            return self._parsed_chunks(self._answer, delta, writer, logprobs)
        if not (delta.text or delta.finish or writer.with_token_ids or logprobs is not None):
            return []
        return [
            writer.delta_chunk(
                delta.choice, delta.text, delta.token_ids, delta.finish, logprobs, stop=delta.stop
            )
        ]

    def _parsed_chunks(
        self,
        answer: AnswerReader,
        delta: Delta,
        writer: ChunkWriter,
        logprobs: msgspec.Raw | None,
    ) -> list[bytes]:
        """A chunk for each kind of text, the first with what belongs to the tokens, and one for the
        end."""
        deltas = answer.feed(delta.text, delta.token_ids, delta.finish)
        ids: Sequence[int] = delta.token_ids
        if ids and not deltas and (writer.with_token_ids or logprobs is not None):
            deltas = [{}]
        chunks: list[bytes] = []
        for each in deltas:
            body = b'"delta":' + msgspec.json.encode(each)
            chunks.append(writer.body_chunk(delta.choice, body, ids, None, logprobs))
            ids, logprobs = (), None
        if delta.finish is not None:
            reason = answer.finish_reason(delta.finish, delta.stop)
            chunks.append(
                writer.body_chunk(
                    delta.choice, b'"delta":{}', ids, reason, logprobs, stop=delta.stop
                )
            )
        return chunks

    def _scored_of(self, delta: Delta) -> list[ScoredToken]:
        if self._num_top is None:
            return []
        scored: list[ScoredToken] = []
        if delta.is_first and self._options.echo:
            scored += zip(self._prompt, (None, *delta.prompt_logprobs), strict=True)
        scored += zip(delta.token_ids, delta.logprobs, strict=True)
        return scored

    async def _shape(self, scored: list[ScoredToken]) -> msgspec.Raw | None:
        if self._num_top is None:
            return None
        if self._chat:
            return await chat_logprobs(self._names, scored, self._num_top)
        return await self._completion.next(scored)
