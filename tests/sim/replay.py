"""`python -m tests.sim.replay SEED`: one schedule with its log on virtual time, for a failing
seed."""

from __future__ import annotations

import argparse

import structlog

from tests.sim import schedules
from tests.sim.many_schedules import KINDS
from tests.sim.sim_loop import SimLoop


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.replay", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="faults")
    parser.add_argument("seed", type=int)
    flags = parser.parse_args()
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
    print(KINDS[flags.kind](flags.seed))


if __name__ == "__main__":
    main()
