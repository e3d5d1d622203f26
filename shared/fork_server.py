"""The serving side of a fork server: a process that has imported and prepared what its children
need, and starts each of them as a copy of itself in some ten milliseconds. Its client is
`node_agent.fork_client`. What to prepare and what to run are its owner's.

A child is in every way like a process that the client started with `exec`: it has a session, a
command line and a log of its own, and it becomes the client's child. For that the server forks
twice and waits for the process in the middle, and the client is a subreaper.

A fork copies the calling thread alone, so a lock that another thread holds would stay locked for
ever in the child. The server therefore refuses to fork while it has a second thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shared.codec import pack, unpack

MESSAGE_BYTES_MAX = 64 << 10
CHANNEL_FLAG, PADDING_FLAG = "--fork-channel", "--argv-padding"
PADDING = "x" * (8 << 10)
"""Makes room in the server's command line for those of its children, which are written over it."""

# Fields of /proc/self/stat, counted from the one after the command's closing bracket.
_ARG_START, _ARG_END = 45, 46


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkServerStatus:
    """How much is prepared. The server takes requests once all is, `done == total`."""

    pid: int
    done: int
    total: int

    @property
    def is_ready(self) -> bool:
        return self.done >= self.total


def report_progress(channel: socket.socket, done: int, total: int) -> None:
    """While there is more to do. A client that is gone is noticed later."""
    if done < total:
        with contextlib.suppress(ConnectionError):
            channel.send(pack(ForkServerStatus(pid=os.getpid(), done=done, total=total)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRequest:
    """`argv` as for `exec`. Stdout and stderr go to the end of `log_path`; if it is empty, to the
    server's own."""

    argv: tuple[str, ...]
    log_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkReply:
    """`error` is empty, or says why there is certainly no child."""

    pid: int
    error: str


def take_channel(argv: Sequence[str]) -> tuple[socket.socket, list[str]]:
    """The channel, and the flags for what is to be prepared, from the server's own command line:
    `python -m MODULE --fork-channel FD --argv-padding PADDING FLAG …`, as `sys.orig_argv` has it.
    Takes the padding out of what /proc shows. Raises ValueError if the process was started by
    hand."""
    at = argv.index(CHANNEL_FLAG)
    flags = list(argv[at + 4 :])
    set_command_line([*argv[:at], *flags])
    return socket.socket(fileno=int(argv[at + 1])), flags


def serve_forks(channel: socket.socket, run: Callable[[list[str]], object]) -> None:
    """Serves `channel`, a SOCK_SEQPACKET socket, until the client closes it. A child calls `run`
    with its `argv` and exits when that returns."""
    gc.collect()
    gc.freeze()  # or the children's collections would copy every page
    try:
        channel.send(pack(ForkServerStatus(pid=os.getpid(), done=1, total=1)))
        while data := channel.recv(MESSAGE_BYTES_MAX):
            channel.send(pack(_fork(unpack(data, ForkRequest), channel, run)))
    except ConnectionError:
        pass  # the client has exited


def _fork(
    request: ForkRequest, channel: socket.socket, run: Callable[[list[str]], object]
) -> ForkReply:
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads != 1:
        return ForkReply(pid=0, error=f"the fork server has {num_threads} threads")
    try:
        command_line = _CommandLine.of(request.argv)
    except ValueError as error:
        return ForkReply(pid=0, error=str(error))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        result, report = os.pipe()
    except OSError as error:
        return ForkReply(pid=0, error=str(error))
    with open(result, "rb") as results:
        try:
            middle = os.fork()
        except OSError as error:
            os.close(report)
            return ForkReply(pid=0, error=str(error))
        if middle == 0:
            _fork_again(report, command_line, lambda: _run_child(request, channel, run))
        os.close(report)
        pid = int(results.read() or b"0")
        os.waitpid(middle, 0)  # now the child is the client's
    return ForkReply(pid=pid, error="" if pid else "the second fork failed")


def _fork_again(report: int, command_line: _CommandLine, child: Callable[[], NoReturn]) -> NoReturn:
    """In the process in the middle. Writes the child's pid to `report`."""
    try:
        command_line.write()
        pid = os.fork()
        if pid == 0:
            os.close(report)
            child()
        os.write(report, b"%d" % pid)
    finally:
        os._exit(0)


def _run_child(
    request: ForkRequest, channel: socket.socket, run: Callable[[list[str]], object]
) -> NoReturn:
    code = 1
    try:
        channel.close()
        os.setsid()
        _redirect(0, "/dev/null", os.O_RDONLY)
        if request.log_path:
            _redirect(1, request.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(1, 2)
        run(list(request.argv))
        code = 0
    except SystemExit as exited:
        code = exited.code if isinstance(exited.code, int) else int(exited.code is not None)
    except BaseException:  # noqa: BLE001 - the child must never return into the server's loop
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(fd: int, path: str, flags: int) -> None:
    opened = os.open(path, flags | os.O_CLOEXEC, 0o666)
    os.dup2(opened, fd)
    os.close(opened)


def set_command_line(argv: Sequence[str]) -> None:
    """What /proc/PID/cmdline shows of this process from now on. Raises ValueError if it is longer
    than the command line with which the process was started."""
    _CommandLine.of(argv).write()


@dataclass(frozen=True, slots=True, kw_only=True)
class _CommandLine:
    """Where this process has its command line, and what to write there. `text` fills the whole
    place and ends with a zero, or the kernel would look for more behind it."""

    address: int
    text: bytes

    @staticmethod
    def of(argv: Sequence[str]) -> _CommandLine:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        begin, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        text = b"".join(os.fsencode(argument) + b"\0" for argument in argv)
        if len(text) > end - begin:
            raise ValueError(f"the command line has more than {end - begin} bytes")
        return _CommandLine(address=begin, text=text.ljust(end - begin, b"\0"))

    def write(self) -> None:
        ctypes.memmove(self.address, self.text, len(self.text))
