"""A chat template: turns the messages of a chat into the prompt text that the model was trained on,
as transformers' `apply_chat_template` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import msgspec
from jinja2 import meta, nodes
from msgspec.structs import replace

from gateway.chat_messages import prepare_messages
from gateway.context_limit import ContextLimit
from gateway.continued_message import cut_at_end, mark_end
from gateway.template_environment import spelt_date, template_environment
from gateway.template_forms import Message, find_forms
from shared.clock import Clock
from shared.errors import CheckpointError, RequestError

RENDER_TIMEOUT_S = 5.0
"""Limit on the time for one chat, looked at whenever the template has written something."""

_PROBE_LIMIT = ContextLimit(tokens_max=100_000, longest_token=1)

_RESERVED = ("messages", "tools", "continue_final_message", "chat_template", "tokenize")
"""Fields of a request, or options of transformers, that are no variables of a template."""

_FAILURES = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError),
    *(MemoryError, RuntimeError, TypeError, ValueError),
)
"""What a template may raise on the messages of a client, its own refusals included."""


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for besides its messages. If `add_generation_prompt` is None, the prompt
    ends with the header of the assistant's next message, unless the last message is to be
    continued. `variables` may replace special tokens, but not what has a field of its own. If
    `asked_at` (Unix seconds) is None, a template that writes the date takes the present one."""

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    variables: Mapping[str, Any] = msgspec.field(default_factory=dict)
    asked_at: float | None = None

    def at(self, asked_at: float | None) -> ChatOptions:
        return replace(self, asked_at=asked_at)


class ChatTemplate:
    """Compiled once; `render` is thread-safe. `variables` are the special tokens by their names
    (`eos_token`). Raises CheckpointError if the source does not compile."""

    def __init__(self, source: str, variables: Mapping[str, str], clock: Clock) -> None:
        self.source = source
        self._environment = template_environment(clock.wall)
        self._variables = dict(variables)
        self._clock = clock
        try:
            self._template = self._environment.from_string(source)
        except _FAILURES as error:  # constants are computed while it compiles
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._forms = find_forms(self._probe)
        self.reads = frozenset(meta.find_undeclared_variables(self._environment.parse(source)))
        """The names of the variables that it reads."""

    def literals(self) -> list[str]:
        """The texts in the source."""
        parsed = self._environment.parse(self.source)
        data = [node.data for node in parsed.find_all(nodes.TemplateData)]
        constants = [node.value for node in parsed.find_all(nodes.Const)]
        return data + [value for value in constants if isinstance(value, str)]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions | None = None,
        *,
        limit: ContextLimit | None = None,
    ) -> str:
        """`content` is a text, null, or a list of text parts. Raises RequestError if the template
        rejects the messages, or writes more than `limit`."""
        options = options or ChatOptions()
        prepared = prepare_messages(messages, self._forms)
        variables = self._checked_variables(options)
        text = mark_end(prepared[-1]) if options.continue_final_message else None
        try:
            rendered = self._render_prepared(prepared, variables, limit)
        except _FAILURES as error:
            raise RequestError(
                f"the model's chat template rejects these messages: {_reason(error)}",
                param="messages",
            ) from error
        return rendered if text is None else cut_at_end(rendered, text)

    def _checked_variables(self, options: ChatOptions) -> dict[str, Any]:
        for name in _RESERVED:
            if name in options.variables:
                raise RequestError(
                    f"chat_template_kwargs: {name} is no variable of a template; pass it as a "
                    "field of the request, if it is one",
                    param="chat_template_kwargs",
                )
        continues = options.continue_final_message
        wanted = options.variables.get("add_generation_prompt", options.add_generation_prompt)
        if continues and wanted:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the model "
                "either goes on with the last message or begins a new one",
                param="continue_final_message",
            )
        return {
            **self._variables,
            **_date_at(options.asked_at),
            "documents": options.documents,
            **options.variables,
            "tools": options.tools,
            "add_generation_prompt": not continues if wanted is None else wanted,
        }

    def _render_prepared(
        self, messages: list[Message], variables: Mapping[str, Any], limit: ContextLimit | None
    ) -> str:
        try:
            return self._render_plain(messages, variables, limit)
        except jinja2.UndefinedError:
            # Null is an absent key, as in transformers. Some templates add to the content of every
            # message, and fail without one.
            if all("content" in message for message in messages):
                raise
        filled = [{"content": "", **message} for message in messages]
        return self._render_plain(filled, variables, limit)

    def _render_plain(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        limit: ContextLimit | None = None,
    ) -> str:
        """Messages as the template reads them. Raises what a template may raise."""
        pieces = self._template.generate({**variables, "messages": messages})
        return "".join(self._bounded(pieces, limit))

    def _probe(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str | None:
        ours = {"documents": None, "add_generation_prompt": False, **self._variables}
        try:
            return self._render_plain(messages, {**ours, **variables}, _PROBE_LIMIT)
        except (*_FAILURES, RequestError):
            return None

    def _bounded(self, pieces: Iterator[str], limit: ContextLimit | None) -> Iterator[str]:
        ends_at, num_chars = self._clock.now() + RENDER_TIMEOUT_S, 0
        for piece in pieces:
            num_chars += len(piece)
            if limit is not None:
                limit.check_chars(num_chars)
            if self._clock.now() > ends_at:
                raise RuntimeError(f"it took longer than {RENDER_TIMEOUT_S:.0f} s")
            yield piece


def _date_at(asked_at: float | None) -> dict[str, Any]:
    if asked_at is None:
        return {}
    return {"strftime_now": lambda form: spelt_date(asked_at, form)}


def _reason(error: BaseException) -> str:
    return "they are nested too deeply" if isinstance(error, RecursionError) else str(error)
