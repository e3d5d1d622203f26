"""The instance's own CUDA MPS daemon, with which ranks compute on one GPU at the same time instead
of alternating."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from pathlib import Path

from shared.errors import ConfigError, Unavailable

_CONTROL = "nvidia-cuda-mps-control"
_START_TIMEOUT_S = 30.0
_QUIT_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 2.0
_POLL_S = 0.05
_SOCKET_PATH_BYTES_MAX = 90  # a Unix socket's 107, less the names that the daemon appends


class CudaMps:
    """A process with `environment` is a client of the daemon. `stop` leaves nothing behind."""

    def __init__(self, run_dir: Path) -> None:
        self._pipe_dir = run_dir / "mps"
        self._log_dir = run_dir / "logs"
        self.pid = 0  # of the daemon, once it runs
        self._pidfd = -1

    @property
    def environment(self) -> dict[str, str]:
        return {
            "CUDA_MPS_PIPE_DIRECTORY": str(self._pipe_dir),
            "CUDA_MPS_LOG_DIRECTORY": str(self._log_dir),
        }

    async def start(self) -> None:
        """Raises ConfigError if this host has no such daemon, Unavailable if it fails."""
        if len(os.fsencode(self._pipe_dir)) > _SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"{self._pipe_dir} is too long for CUDA MPS; pass a shorter --run-dir"
            )
        self._pipe_dir.mkdir(exist_ok=True)
        try:
            code, output = await self._call("-d", timeout_s=_START_TIMEOUT_S)
        except OSError as error:
            raise ConfigError(
                f"{_CONTROL}: {error.strerror}; ranks that share a GPU need it: install it, start "
                "at most one rank per GPU, or pass --no-cuda-mps"
            ) from error
        if code != 0:
            raise Unavailable(f"{_CONTROL} did not start: {output or f'exit code {code}'}")
        self.pid = await self._read_pid()
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            raise Unavailable(f"{_CONTROL} exited at once: {output}") from error

    async def stop(self) -> None:
        """Call it when the clients have exited. Idempotent."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(OSError, Unavailable):
            await self._call(words="quit -t 5\n", timeout_s=_QUIT_TIMEOUT_S)
        if not await self._has_ended():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self._has_ended()
        os.close(self._pidfd)
        self._pidfd = -1

    async def _has_ended(self) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        for _ in range(round(_END_TIMEOUT_S / _POLL_S)):
            if poller.poll(0):
                return True
            await asyncio.sleep(_POLL_S)
        return False

    async def _read_pid(self) -> int:
        """The daemon forks away from the process that we started, and writes its pid. Raises
        Unavailable."""
        path = self._pipe_dir / f"{_CONTROL}.pid"
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while True:
                    with contextlib.suppress(OSError, ValueError):
                        return int(path.read_text())
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise Unavailable(f"{_CONTROL} left no {path.name} in {self._pipe_dir}") from None

    async def _call(self, *flags: str, words: str = "", timeout_s: float) -> tuple[int, str]:
        """Returns its exit code and its last line. Raises OSError if it cannot run, Unavailable if
        it does not end in time."""
        log_path = self._log_dir / "mps.log"
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(_CONTROL, *flags),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,  # a file: the daemon would keep a pipe open
                stderr=log,
                start_new_session=True,
                env=os.environ | self.environment,
            )
        try:
            async with asyncio.timeout(timeout_s):
                await process.communicate(words.encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            raise Unavailable(f"{_CONTROL} did not answer within {timeout_s:.0f} s") from None
        lines = log_path.read_text(errors="replace").splitlines()
        assert process.returncode is not None
        return process.returncode, lines[-1] if lines else ""
