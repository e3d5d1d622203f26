"""A full disk costs log lines, never a process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import structlog

from shared.logs import TolerantStream, open_log


def test_a_line_that_cannot_be_written_is_dropped() -> None:
    lines_written = 0
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        logger = structlog.PrintLogger(TolerantStream(full))  # type: ignore[arg-type]
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


def test_a_log_that_cannot_be_opened_is_discarded(tmp_path: Path) -> None:
    with open_log(tmp_path / "no folder" / "x.log") as log:
        log.write(b"gone")
    with open_log(tmp_path / "x.log") as log:
        log.write(b"kept")
    assert (tmp_path / "x.log").read_bytes() == b"kept"
