"""A fork server of `toy_process.py`. The environment variable TOY_FORK_SERVER has it fail: `broken`
exits before it is prepared, `threaded` has a second thread, `slow` takes SLOW_S to prepare."""

from __future__ import annotations

import os
import sys
import threading
import time

from shared.fork_server import serve_forks, take_channel
from tests.support import toy_process

SLOW_S = 5.0  # longer than a lease of 3 s


def main() -> None:
    failure = os.environ.get("TOY_FORK_SERVER", "")
    channel, _ = take_channel(sys.orig_argv)
    if failure == "broken":
        sys.exit(1)
    if failure == "threaded":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    if failure == "slow":
        time.sleep(SLOW_S)
    serve_forks(channel, run_toy)


def run_toy(argv: list[str]) -> None:
    sys.argv = argv[1:]
    toy_process.main()


if __name__ == "__main__":
    main()
