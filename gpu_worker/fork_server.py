"""`python -m gpu_worker.fork_server`: starts the ranks of a host as copies of one process that has
imported everything and loaded the kernels. It touches no device and opens no connection: neither
survives a fork.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from gpu_worker.__main__ import main as run_rank_main
from gpu_worker.__main__ import parse
from gpu_worker.config import RankConfig
from gpu_worker.device_choice import has_device_file
from shared.errors import StarfishError
from shared.fork_server import report_progress, serve_forks, take_channel
from shared.model_spec import read_model_spec
from shared.types import DeviceKind


def main() -> None:
    """The flags are those of the ranks."""
    channel, flags = take_channel(sys.orig_argv)
    with channel:
        # A rank that cannot start says so itself, in its own log.
        with suppress(StarfishError, OSError, ImportError):
            prepare(parse(flags), partial(report_progress, channel))
        serve_forks(channel, run_rank)


def prepare(config: RankConfig, on_progress: Callable[[int, int], None]) -> None:
    """Imports what a rank of this configuration needs, and loads its kernels. Raises
    StarfishError, OSError and ImportError; the rank then does the rest by itself."""
    on_card = config.device is not DeviceKind.CPU and has_device_file()
    if on_card:
        with suppress(ImportError):
            import gpu_worker.cuda.decoder
            import gpu_worker.cuda.hardware
            from gpu_worker.cuda.kernels.preload import preload_kernels

            preload_kernels()
    if not on_card or config.device is DeviceKind.AUTO:
        import gpu_worker.cpu.hardware  # noqa: F401
    if not on_card and config.model is not None:
        from gpu_worker.cpu.registry import load_kernels

        load_kernels(config.model, read_model_spec(config.model), on_progress)


def run_rank(argv: list[str]) -> None:
    """In the child. `argv` is `python -m gpu_worker FLAG …`."""
    sys.argv = argv[2:]
    run_rank_main()


if __name__ == "__main__":
    main()
