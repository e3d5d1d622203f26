"""A full disk costs log lines, never a process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import structlog

from shared.logs import TolerantStream, configure_logs, open_log, render_line


def test_a_line_that_cannot_be_written_is_dropped() -> None:
    lines_written = 0
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        logger = structlog.WriteLogger(TolerantStream(full))  # type: ignore[arg-type]
        for _ in range(1000):
            logger.info("a line " * 20)
            lines_written += 1
    assert lines_written == 1000


def test_the_first_line_that_can_be_written_again_says_that_some_are_missing() -> None:
    class Disk(io.StringIO):
        is_full = False

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    stream = TolerantStream(disk)
    stream.write("one\n")
    disk.is_full = True
    stream.write("two\n")
    disk.is_full = False
    stream.write("three\n")
    stream.write("four\n")
    assert disk.getvalue().splitlines() == [
        "one",
        "log lines were lost: they could not be written",
        "three",
        "four",
    ]


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    monkeypatch.setattr("sys.stderr", Terminal())
    try:
        configure_logs(service="test")
        structlog.get_logger().info("an event", number=7)
    finally:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
    (line,) = writes
    assert "an event" in line
    assert line.endswith("number=7 service=test\n")


def test_a_log_that_cannot_be_opened_is_discarded(tmp_path: Path) -> None:
    with open_log(tmp_path / "no folder" / "x.log") as log:
        log.write(b"gone")
    with open_log(tmp_path / "x.log") as log:
        log.write(b"kept")
    assert (tmp_path / "x.log").read_bytes() == b"kept"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"status": 200, "path": "/v1/models", "duration_ms": 1.5, "key": ""},
        {"detail": "two words", "members": ["1.0", "2.0"], "cause": None},
        {"event": "an_event_with_a_name_of_many_characters", "b": b"x"},
        {"exception": "Traceback:\n  boom"},
    ],
)
def test_lines_are_those_of_the_console_without_colours(values: dict[str, object]) -> None:
    event = {"timestamp": "2026-01-02T03:04:05", "level": "info", "event": "request", **values}
    console = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=24)
    line = render_line(None, "info", dict(event))
    shown = str(console(None, "info", dict(event)))
    assert line.splitlines() == [each.rstrip() for each in shown.splitlines()]
