"""How a command ends: its exit code, and one sentence instead of a traceback for a known error."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import typer

from shared.errors import StarfishError


def run_command(work: Coroutine[Any, Any, int], *, cleans_up_on_term: bool = False) -> None:
    """Runs the command's coroutine and exits with the code it returns. Ctrl-C cancels it;
    `cleans_up_on_term`: so does SIGTERM."""
    try:
        code = asyncio.run(_cancelled_on_term(work) if cleans_up_on_term else work)
    except StarfishError as error:
        code = _fail(str(error))
    except ExceptionGroup as group:
        known, unknown = group.split(StarfishError)
        if known is None or unknown is not None:
            raise
        code = _fail(str(_first(known)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    raise typer.Exit(code)


async def _cancelled_on_term(work: Coroutine[Any, Any, int]) -> int:
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def _fail(sentence: str) -> int:
    print(f"starfish: {sentence}", file=sys.stderr)
    return 1


def _first(group: BaseExceptionGroup[StarfishError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
