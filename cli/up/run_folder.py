"""The folder of one `starfish up` run: what the start creates in it and the end removes."""

from __future__ import annotations

import shutil
from pathlib import Path

from cli.run_dir import create_run_dir, remove_state


class RunFolder:
    """`is_default`: no flag named the folder, so it is removed whole. A folder that a flag named
    stays, with whatever others have put there."""

    def __init__(self, path: Path, *, is_default: bool) -> None:
        self.path = path
        self.is_default = is_default
        self.log_dir = path / "logs"

    def prepare(self) -> None:
        """Creates the folder, without files of an earlier run. Raises ConfigError if it cannot
        belong to this user alone."""
        create_run_dir(self.path)
        self.remove_files(keep_logs=False)
        create_run_dir(self.path)
        self.log_dir.mkdir(exist_ok=True)

    def remove_files(self, *, keep_logs: bool) -> None:
        remove_state(self.path)
        for part in ("etcd", "mps"):
            shutil.rmtree(self.path / part, ignore_errors=True)
        if not keep_logs:
            shutil.rmtree(self.log_dir, ignore_errors=True)
            if self.is_default:
                shutil.rmtree(self.path, ignore_errors=True)
