"""`python -m gateway.standby FD --listen-fd FDS FLAG …`: a gateway that follows the instance and
has links to all ranks, but no clients. It waits to be told by the pipe FD which of the listening
sockets it takes over, and to which log file it then writes. From then on it is
`python -m gateway --listen-fd … FLAG …` in every way."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gateway.__main__ import parse, read_api_keys, serve, warn_if_open
from gateway.config import GatewayConfig
from gateway.service import Listeners
from shared.errors import StarfishError
from shared.fork_server import set_command_line
from shared.listener import inherited_listener, listen_alone
from shared.logs import open_log
from shared.standby import until_told_to_begin


def main() -> None:
    begin_fd, option, listen_fds, *flags = sys.argv[1:]
    config = parse(flags)
    try:
        api_keys = read_api_keys(config)
    except StarfishError as error:
        sys.exit(f"gateway: {error}")

    async def take_over() -> Listeners | None:
        """None: nobody will need it. Raises ConfigError."""
        words = await until_told_to_begin(int(begin_fd))
        if not words:
            return None
        listen_fd, log_file = words
        for other in set(listen_fds.split(",")) - {listen_fd}:  # whose gateways may close them
            os.close(int(other))
        with open_log(Path(log_file)) as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        set_command_line([sys.executable, "-m", "gateway", option, listen_fd, *flags])
        listeners = _listeners(config, int(listen_fd))
        warn_if_open(listeners, api_keys)
        return listeners

    serve(config, api_keys, take_over)


def _listeners(config: GatewayConfig, fd: int) -> Listeners:
    shared = inherited_listener(fd)
    return Listeners(shared, listen_alone(shared, config.own_port))


if __name__ == "__main__":
    main()
