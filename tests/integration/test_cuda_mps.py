"""The life of an instance's own CUDA MPS daemon, with a script in place of NVIDIA's: it, too,
leaves its starter, writes its pid into the pipe folder, and takes `quit` on standard input."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cli.up.mps import CudaMps
from shared.errors import ConfigError, Unavailable

DAEMON = """#!/bin/sh
pid_file=$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid
if [ "$1" = -d ]; then
  [ -d "$CUDA_MPS_LOG_DIRECTORY" ] || exit 3
  setsid sleep 600 </dev/null >/dev/null 2>&1 &
  echo $! > "$pid_file"
else
  read word rest
  [ "$word" = quit ] && kill "$(cat "$pid_file")"
fi
"""
STUBBORN = DAEMON.replace("quit ]", "never ]")
REFUSAL = "#!/bin/sh\necho 'An instance of this daemon is already running' >&2\nexit 1\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    return folder


def install(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / "nvidia-cuda-mps-control"
    binary.parent.mkdir()
    binary.write_text(script)
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")


def is_gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.parametrize("script", [DAEMON, STUBBORN], ids=["that quits", "that does not"])
async def test_a_daemon_is_gone_after_stop(
    script: str, tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(script, tmp_path, monkeypatch)
    mps = CudaMps(run_dir)
    await mps.start()
    pid = mps.pid
    assert not is_gone(pid)
    assert Path(mps.environment["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
    await mps.stop()
    assert is_gone(pid)
    await mps.stop()


async def test_a_missing_binary_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(run_dir))
    with pytest.raises(ConfigError, match="nvidia-cuda-mps-control"):
        await CudaMps(run_dir).start()


async def test_a_refusal_is_told_in_the_daemons_words(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(REFUSAL, tmp_path, monkeypatch)
    with pytest.raises(Unavailable, match="already running"):
        await CudaMps(run_dir).start()


async def test_a_folder_that_no_socket_can_stand_in_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="--run-dir"):
        await CudaMps(run_dir / ("x" * 100)).start()
