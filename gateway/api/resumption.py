"""Streams that a client may resume after its connection has broken, at any gateway: a reconnect
with the id of the last event, in the header `Last-Event-ID`, goes on with what would have
followed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from aiohttp import web

from gateway.api.request_context import require_context
from gateway.api.routes import endpoint_of
from gateway.stream_names import StreamName, StreamNames
from gateway.stream_position import (
    CHOICES_MAX,
    ChoicePosition,
    PositionWriter,
    StreamPosition,
    position_in,
    positions_of,
)
from shared.clock import Clock
from shared.errors import RequestError

LAST_EVENT_ID = "Last-Event-ID"
ID_CHARACTERS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """An answer whose events have ids. `read` is what its client has had of it; None: it is new.
    `keys` are those by which ranks know its choices."""

    answer_id: str
    created: int
    seed: int
    spelt_name: str
    read: StreamPosition | None
    keys: tuple[bytes, ...]

    def position_of(self, choice: int) -> ChoicePosition:
        return positions_of(self.read, len(self.keys))[choice]

    def position_writer(self, *, counts_events: bool = False) -> PositionWriter:
        num_read = 0 if self.read is None else self.read.num_events
        return PositionWriter(
            self.spelt_name, len(self.keys), num_events=num_read if counts_events else None
        )


class Resumption:
    """Makes streams, and finds those that are resumed. It keeps nothing of them. Without
    `event_ids` there are none."""

    def __init__(self, names: StreamNames, clock: Clock, *, event_ids: bool) -> None:
        self._names = names
        self._clock = clock
        self._event_ids = event_ids

    def open(self, request: web.Request, *, fingerprint: str, num_choices: int) -> Stream | None:
        """The stream with which the request is answered, whose body has been read. `fingerprint` is
        the model's. None if it cannot be resumed: it has too many choices. Raises RequestError if
        the client wants to go on with a stream that this request has not begun."""
        sent = request.headers.get(LAST_EVENT_ID, "")
        if not self._event_ids:
            if sent:
                raise not_resumable("a stream of this gateway, started with --no-event-ids,")
            return None
        if num_choices > CHOICES_MAX:
            if sent:
                raise not_resumable(f"an answer of more than {CHOICES_MAX} choices")
            return None
        context = require_context(request)
        tenant = context.key.name
        belongings = _belongings(tenant, endpoint_of(request), fingerprint, context.body_digest)
        if sent:
            name, read = self._read(sent, belongings)
            if read.choices and len(read.choices) != num_choices:
                raise _foreign()
        else:
            name, read = self._names.new(self._clock.wall()), None
        return Stream(
            answer_id=self._names.answer_id(name),
            created=name.created,
            seed=self._names.seed(name),
            spelt_name=self._names.spell(name, belongings),
            read=read,
            keys=tuple(self._names.key(name, tenant, choice) for choice in range(num_choices)),
        )

    def _read(self, sent: str, belongings: bytes) -> tuple[StreamName, StreamPosition]:
        found = position_in(sent) if len(sent) <= ID_CHARACTERS_MAX else None
        name = None if found is None else self._names.read(found[0], belongings)
        if found is None or name is None:
            raise _foreign()
        return name, found[1]


def body_digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()


def check_not_resumed(request: web.Request, *, streams: bool) -> None:
    """For answers without ids of events. Raises RequestError."""
    if request.headers.get(LAST_EVENT_ID):
        path = endpoint_of(request)
        raise not_resumable(f"{'a stream' if streams else 'an answer without `stream`'} of {path}")


def not_resumable(what: str) -> RequestError:
    return RequestError(
        f"{LAST_EVENT_ID}: {what} cannot be resumed; leave the header out to begin anew",
        param=LAST_EVENT_ID,
    )


def _foreign() -> RequestError:
    return RequestError(
        f"{LAST_EVENT_ID} is not the id of an event of this request's stream: a stream is resumed "
        "with the same path, body and API key, on an instance with the same model and version",
        param=LAST_EVENT_ID,
    )


def _belongings(tenant: str, path: str, fingerprint: str, digest: bytes) -> bytes:
    # None of these has a zero byte, and the digest has always one length.
    return b"\0".join([tenant.encode(), path.encode(), fingerprint.encode(), digest])
