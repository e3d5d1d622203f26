"""The real node agent with `toy_process.py` as its ranks. Takes the agent's flags."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from pathlib import Path

from node_agent.__main__ import parse, rank_command, run_agent
from node_agent.agent_driver import RankSetup
from node_agent.expert_cache import with_expert_cache
from shared.logs import configure_logs

TOY_RANK = Path(__file__).with_name("toy_process.py")
TOY_FORK_SERVER = Path(__file__).with_name("toy_fork_server.py")
ROOT = Path(__file__).parents[2]


def main() -> None:
    config, rank_flags = parse(sys.argv[1:])
    configure_logs(service="agent", json=True)
    command = dataclasses.replace(
        rank_command(config, rank_flags), program=(sys.executable, str(TOY_RANK))
    )
    command = with_expert_cache(command, config.host_experts_gb)
    setup = RankSetup(
        command=command,
        environment={**os.environ, "PYTHONPATH": str(ROOT)},
        log_dir=config.log_dir,
        lease_ttl_s=config.lease_ttl_s,
        stop_grace_s=config.stop_grace_s,
        dying_poll_s=config.dying_poll_ms / 1000,
        fork_server=(sys.executable, str(TOY_FORK_SERVER)) if config.fork_ranks else (),
    )
    asyncio.run(run_agent(config, setup))


if __name__ == "__main__":
    main()
