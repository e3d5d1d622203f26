"""`python -m gateway.standby FD FLAG …`: a gateway that has imported everything and waits for a
byte from the pipe FD. Then it is `python -m gateway FLAG …` in every way."""

from __future__ import annotations

import sys

from gateway.__main__ import main as run_gateway_main
from shared.fork_server import set_command_line
from shared.standby import wait_to_begin


def main() -> None:
    begin_fd, flags = int(sys.argv[1]), sys.argv[2:]
    if not wait_to_begin(begin_fd):
        return
    set_command_line([sys.executable, "-m", "gateway", *flags])
    sys.argv = ["gateway", *flags]
    run_gateway_main()


if __name__ == "__main__":
    main()
