"""The grammar child, `python -m shared.grammars.worker`: compiles on one thread and advances
matchers on another, for the process at the other end of its socket. Its memory has a hard limit;
its time is its parent's to watch, which kills it."""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shared.errors import GrammarError, StarfishError
from shared.grammars.compiler import GrammarCompiler, Matcher
from shared.grammars.messages import (
    Advance,
    Began,
    Check,
    Checked,
    Close,
    Gone,
    Mask,
    Open,
    Ready,
    Refused,
    Reply,
    Unusable,
    frame,
    read_request,
)
from shared.grammars.sources import grammar_of

COMPILE_NICENESS = 10
"""Added to this process's own: compiling must not take the cores from the steps of a CPU rank."""
_STACK_BYTES = 64 << 20  # a deep grammar must run into the library's own limits first


def main() -> None:
    arguments = _parse()
    limit = _limit_memory(arguments.memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    with socket.socket(fileno=arguments.fd) as channel, contextlib.suppress(OSError):
        try:
            compiler = GrammarCompiler(
                arguments.tokenizer,
                vocab_size=arguments.vocab_size or None,
                eos_token_ids=arguments.eos,
                cache_bytes_max=limit // 4,
            )
        except StarfishError as error:
            channel.sendall(frame(Unusable(error=str(error))))
        else:
            GrammarWorker(channel, compiler).run()
    os._exit(0)  # whatever is being compiled


def _limit_memory(num_bytes: int) -> int:
    """Of address space. Returns the limit, which is less where this process has a lower one: to
    raise that is for the privileged alone."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return limit


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m shared.grammars.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=0)
    parser.add_argument("--eos", type=int, nargs="*", default=[])
    parser.add_argument("--memory-mb", type=int, required=True)
    return parser.parse_args()


class GrammarWorker:
    """Serves one parent until it is gone."""

    def __init__(self, channel: socket.socket, compiler: GrammarCompiler) -> None:
        self._channel = channel
        self._compiler = compiler
        self._matchers: dict[int, Matcher | None] = {}  # None: being made
        self._sending = threading.Lock()

    def run(self) -> None:
        self._send(Ready(end_ids=list(self._compiler.end_ids)))
        compiling, stepping = _Thread(nice=COMPILE_NICENESS), _Thread()
        reader = self._channel.makefile("rb")
        while header := reader.read(4):
            request = read_request(reader.read(int.from_bytes(header, "little")))
            match request:
                case Check():
                    compiling.put(lambda r=request: self._check(r))  # type: ignore[misc]
                case Open(matcher=matcher):
                    self._matchers[matcher] = None
                    compiling.put(lambda r=request: self._open(r))  # type: ignore[misc]
                case Advance():
                    stepping.put(lambda r=request: self._advance(r))  # type: ignore[misc]
                case Close(matcher=matcher):
                    self._matchers.pop(matcher, None)

    def _check(self, request: Check) -> None:
        self._send(Began(job=request.job))
        try:
            grammar = grammar_of(
                request.kind,
                request.text,
                json_space=request.json_space,
                special_ids=self._compiler.special_ids,
            )
            self._compiler.try_out(grammar)
        except GrammarError as error:
            self._send(Refused(job=request.job, error=str(error)))
        else:
            self._send(Checked(job=request.job, grammar=grammar))

    def _open(self, request: Open) -> None:
        if request.matcher not in self._matchers:  # closed meanwhile
            self._send(Gone(job=request.job))
            return
        self._send(Began(job=request.job))
        try:
            matcher = self._compiler.open(request.grammar, request.emitted)
            bits = matcher.bits()
        except GrammarError as error:
            self._send(Refused(job=request.job, error=str(error)))
            return
        if request.matcher in self._matchers:
            self._matchers[request.matcher] = matcher
        self._send(Mask(job=request.job, bits=bits))

    def _advance(self, request: Advance) -> None:
        matcher = self._matchers.get(request.matcher)
        if matcher is None:
            self._send(Gone(job=request.job))
            return
        try:
            began_s = time.thread_time()
            matcher.accept((request.token,))
            bits = matcher.bits()
            self._send(Mask(job=request.job, bits=bits, cost_s=time.thread_time() - began_s))
        except GrammarError as error:
            self._send(Refused(job=request.job, error=str(error)))

    def _send(self, reply: Reply) -> None:
        data = frame(reply)
        with self._sending:
            self._channel.sendall(data)


class _Thread:
    """Runs what is put, in order, `nice` more than the process: less is for the privileged alone.
    If one fails, the process ends: its parent starts another."""

    def __init__(self, nice: int = 0) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._nice = nice
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def _run(self) -> None:
        try:
            if self._nice:
                own = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own + self._nice)
            while True:
                self._jobs.get()()
        except BaseException:  # noqa: BLE001 - also of the library: a panic
            os._exit(1)


if __name__ == "__main__":
    main()
