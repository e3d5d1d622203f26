"""When another child is started, and when there is no more; and that a child asks for nothing that
its own process may not have: less niceness, more memory."""

from __future__ import annotations

import os
import queue
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.grammars import child, supervisor
from shared.grammars.child import ChildEnd, TokenizerFile
from shared.grammars.messages import (
    Advance,
    Began,
    GrammarBudget,
    GrammarKind,
    Mask,
    Open,
    Ready,
    Refused,
    Reply,
    frame,
)
from shared.grammars.sources import grammar_of
from shared.grammars.supervisor import USELESS_ENDS_MAX, GrammarSupervisor
from shared.grammars.worker import COMPILE_NICENESS

MODEL = Path(__file__).parents[4] / "models" / "starling-14m"
TOKENIZER = TokenizerFile(path=MODEL / "tokenizer.json", vocab_size=4096, eos_token_ids=(2,))
PATIENCE_S = 60.0
READY = Ready(end_ids=[2])


class Watched:
    """A supervisor whose children say `messages` and end, or real ones; and what it makes known:
    the end of a child that another followed, a reply, or in a few words that there is no more."""

    def __init__(self) -> None:
        self.heard: queue.Queue[ChildEnd | Reply | str] = queue.Queue()
        self.supervisor = GrammarSupervisor(
            TOKENIZER,
            GrammarBudget(),
            on_reply=self.heard.put,
            on_restart=self.heard.put,
            on_unavailable=self.heard.put,
        )

    def next(self) -> ChildEnd | Reply | str:
        return self.heard.get(timeout=PATIENCE_S)

    def ends_until_there_is_no_more(self, at_most: int) -> int | None:
        """How many children ended before; None if `at_most` of them were followed by another."""
        ends = 0
        while ends < at_most:
            heard = self.next()
            if isinstance(heard, str):
                return ends + 1
            ends += isinstance(heard, ChildEnd)
        return None


@contextmanager
def watched() -> Iterator[Watched]:
    found = Watched()
    try:
        yield found
    finally:
        found.supervisor.close()


def children_say(monkeypatch: pytest.MonkeyPatch, *messages: Ready | Began | Refused) -> None:
    said = b"".join(frame(message) for message in messages)

    def command(tokenizer: TokenizerFile, budget: GrammarBudget, fd: int) -> tuple[str, ...]:
        return (sys.executable, "-S", "-c", f"import os; os.write({fd}, {said!r}); os._exit(1)")

    monkeypatch.setattr(child, "_command", command)
    monkeypatch.setattr(supervisor, "_BACKOFF_MAX_S", 0.05)


@pytest.mark.parametrize("messages", [(), (READY,)], ids=["unready", "ready"])
def test_children_that_end_by_themselves_are_not_followed_for_ever(
    monkeypatch: pytest.MonkeyPatch, messages: tuple[Ready, ...]
) -> None:
    children_say(monkeypatch, *messages)
    with watched() as seen:
        seen.supervisor.start()
        ends = seen.ends_until_there_is_no_more(at_most=3 * USELESS_ENDS_MAX)
    assert ends == USELESS_ENDS_MAX + 1


@pytest.mark.parametrize(
    "messages",
    [(READY, Began(job=1)), (READY, Refused(job=1, error="it is malformed"))],
    ids=["a job ended it", "it answered"],
)
def test_a_child_that_did_something_is_always_followed(
    monkeypatch: pytest.MonkeyPatch, messages: tuple[Ready | Began | Refused, ...]
) -> None:
    children_say(monkeypatch, *messages)
    with watched() as seen:
        seen.supervisor.start()
        assert seen.ends_until_there_is_no_more(at_most=3 * USELESS_ENDS_MAX) is None


def test_a_child_that_lasted_is_always_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    children_say(monkeypatch, READY)
    monkeypatch.setattr(supervisor, "LASTS_S", 0.0)
    with watched() as seen:
        seen.supervisor.start()
        assert seen.ends_until_there_is_no_more(at_most=3 * USELESS_ENDS_MAX) is None


def test_a_child_of_a_nice_process_is_as_nice_and_serves() -> None:
    """Without privileges a thread that asks for less is refused, and with them it would take the
    cores from what its own process yields to."""
    own = os.getpriority(os.PRIO_PROCESS, 0) + 3
    with watched() as seen:
        starter = threading.Thread(target=_start_nicely, args=(seen.supervisor, own))
        starter.start()
        starter.join()
        assert isinstance(seen.next(), Ready)
        grammar = grammar_of(GrammarKind.REGEX, "ab")
        seen.supervisor.send(Open(job=1, matcher=1, grammar=grammar, emitted=[]))
        mask = seen.next()
        assert isinstance(mask, Mask), mask
        allowed = int.from_bytes(mask.bits, "little")
        token = (allowed & -allowed).bit_length() - 1
        seen.supervisor.send(Advance(job=2, matcher=1, token=token))
        assert isinstance(seen.next(), Mask)
        pid = seen.supervisor.pid
        assert pid is not None
        levels = [os.getpriority(os.PRIO_PROCESS, int(t.name)) for t in _threads(pid)]
    assert sorted(set(levels)) == [own, min(own + COMPILE_NICENESS, 19)]


def test_a_child_of_a_process_with_a_lower_limit_of_memory_keeps_it_and_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lower = (GrammarBudget().memory_mb - 1) << 20
    real = child._command

    def command(tokenizer: TokenizerFile, budget: GrammarBudget, fd: int) -> Sequence[str]:
        under = f'ulimit -v {lower >> 10} && exec "$@"'
        return ("sh", "-c", under, "sh", *real(tokenizer, budget, fd))

    monkeypatch.setattr(child, "_command", command)
    with watched() as seen:
        seen.supervisor.start()
        assert isinstance(seen.next(), Ready)
        pid = seen.supervisor.pid
        assert pid is not None
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (lower, lower)


def _start_nicely(found: GrammarSupervisor, niceness: int) -> None:
    """On a thread of its own: a process without privileges could not take it back."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
    found.start()


def _threads(pid: int) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").iterdir()
