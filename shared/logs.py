"""structlog, set up once per process: events with fields, to stderr. A disk without space costs
lines, never a process."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import IO, TextIO

import structlog

_EVENT_WIDTH = 24
_UNQUOTED = re.compile(r"[^ \t=\r\n\"']*")


def open_log(path: Path) -> IO[bytes]:
    """To append to. Nothing is kept if the file cannot be opened."""
    try:
        return path.open("ab")
    except OSError:
        return open(os.devnull, "ab")


class TolerantStream:
    """Drops what cannot be written, and says so once writing works again."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_lost = False

    def write(self, text: str) -> int:
        try:
            if self._has_lost:
                self._stream.write("log lines were lost: they could not be written\n")
                self._has_lost = False
            return self._stream.write(text)
        except OSError:
            self._has_lost = True
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._has_lost = True


def render_line(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> str:
    """What structlog's console renderer writes without colours, in a fifth of its time: the
    gateway writes a line for each request."""
    exception = event.pop("exception", None)
    head = f"{event.pop('timestamp')} [{event.pop('level'):9}] {event.pop('event'):{_EVENT_WIDTH}}"
    line = " ".join([head, *(f"{key}={_shown(value)}" for key, value in sorted(event.items()))])
    line = line.rstrip()
    return line if exception is None else f"{line}\n{exception}"


def _shown(value: object) -> str:
    if not isinstance(value, str) or not _UNQUOTED.fullmatch(value):
        return repr(value)
    return value


def configure_logs(
    *, service: str, level: str = "info", json: bool = False, **context: object
) -> None:
    """Every later `structlog.get_logger()` writes one line per event, with `service` and
    `context`."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(pad_event_to=_EVENT_WIDTH)
        if sys.stderr.isatty()
        else render_line
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=False),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(TolerantStream(sys.stderr)),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, **context)
