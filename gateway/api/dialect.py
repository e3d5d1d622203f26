"""How an answer is spelt, for APIs that are not OpenAI's chat completions: in one body, or as the
events of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.api.bodies import UNSUPPORTED_FIELD
from gateway.api.errors import HttpError
from gateway.api.responses import Usage
from shared.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """`reason` is OpenAI's finish reason; `stop_string` is what ended the text, if one did."""

    reason: str
    stop_string: str | None
    usage: Usage


class Dialect(Protocol):
    """For one answer. Implemented by `anthropic.answer` and `openai_responses.answer`."""

    def whole(self, deltas: Sequence[Mapping[str, Any]], ending: Ending) -> bytes:
        """The body for all of OpenAI's deltas: what a stream's events add up to."""
        ...

    def number_from(self, number: int) -> None:
        """The next event has this number, if events have any."""
        ...

    def begin(self, usage: Usage) -> list[bytes]:
        """The first events. `usage` knows the prompt."""
        ...

    def deltas(self, deltas: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Events for OpenAI's deltas."""
        ...

    def end(self, ending: Ending) -> list[bytes]: ...

    def failed(self, error: HttpError) -> bytes:
        """The last events of a stream that fails after it has begun."""
        ...


@contextmanager
def naming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """A RequestError that is raised inside names the field that the client has sent. `names`:
    OpenAI's field → the dialect's. One that refuses a field by its name is as it is."""
    try:
        yield
    except RequestError as error:
        name = names.get(error.param or "")
        if name is None or error.code == UNSUPPORTED_FIELD:
            raise
        message = str(error).replace(str(error.param), name, 1)
        raise RequestError(message, param=name, code=error.code) from error


def sent_event(kind: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
