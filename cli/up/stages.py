"""Progress of `starfish up`: one line per stage, with a spinner on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.markup import escape

from shared.clock import Clock


class Stage:
    """A stage in progress. `update` shows its progress; `result` is shown at its end."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._status = console.status(escape(title))
        self._last = ""
        self.result = ""

    def update(self, text: str) -> None:
        if text == self._last:
            return
        self._last = text
        if self._console.is_terminal:
            self._status.update(f"{escape(self._title)}: {escape(text)}")
        else:
            self._console.print(f"  {self._title}: {text}", markup=False, highlight=False)

    def __enter__(self) -> Stage:
        if self._console.is_terminal:
            self._status.start()
        else:
            self._console.print(f"  {self._title} …", markup=False, highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()


class Stages:
    def __init__(self, console: Console, clock: Clock) -> None:
        self.console = console
        self._clock = clock

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Prints the stage with a tick at its end, unless it fails."""
        started_at = self._clock.now()
        with Stage(self.console, title) as stage:
            yield stage
        took_s = self._clock.now() - started_at
        result = f": {escape(stage.result)}" if stage.result else ""
        self.console.print(
            f"[green]✓[/] {escape(title)}{result} [dim]({took_s:.1f} s)[/]", highlight=False
        )

    def warn(self, text: str) -> None:
        """Serving goes on even if nobody can read it: the output may be a file on a full disk."""
        with suppress(OSError):
            self.console.print(f"[yellow]![/] {escape(text)}", highlight=False)
