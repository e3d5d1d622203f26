"""`python -m tests.sim.replay SEED`: one schedule with its log on virtual time, for a failing
seed; with `--changes` the one in which people change the instance on purpose."""

from __future__ import annotations

import sys

import structlog

from tests.sim import change_schedules, schedules
from tests.sim.sim_loop import SimLoop


def main() -> None:
    loops: list[SimLoop] = []

    class WatchedLoop(SimLoop):
        def __init__(self) -> None:
            super().__init__()
            loops.append(self)

    def virtual_time(
        _: object, __: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        return {"ms": round((loops[-1].time() - 1000) * 1000, 2), **event}

    structlog.configure(
        processors=[
            virtual_time,
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=False),
        ]
    )
    schedules.SimLoop = WatchedLoop  # type: ignore[misc]
    *flags, seed = sys.argv[1:]
    run = change_schedules.run_change_schedule if flags else schedules.run_schedule
    print(run(int(seed)))


if __name__ == "__main__":
    main()
