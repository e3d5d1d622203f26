"""`python -m gateway.standby FD --listen-fd FDS FLAG …`: a gateway that has imported everything,
and waits to be told by the pipe FD which of the listening sockets it takes over, and to which log
file it then writes. Then it is `python -m gateway --listen-fd … FLAG …` in every way."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gateway.__main__ import main as run_gateway_main
from shared.fork_server import set_command_line
from shared.logs import open_log
from shared.standby import wait_to_begin


def main() -> None:
    begin_fd, option, listen_fds, *flags = sys.argv[1:]
    words = wait_to_begin(int(begin_fd))
    if not words:
        return
    listen_fd, log_file = words
    for other in set(listen_fds.split(",")) - {listen_fd}:  # whose gateways may close them
        os.close(int(other))
    with open_log(Path(log_file)) as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    sys.argv = ["gateway", option, listen_fd, *flags]
    set_command_line([sys.executable, "-m", *sys.argv])
    run_gateway_main()


if __name__ == "__main__":
    main()
