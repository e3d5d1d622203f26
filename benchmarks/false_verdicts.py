"""How often a rank that nobody touched is declared dead: an instance of its own serves a steady
load beside busy neighbours, and with --kill-every-s some rank is killed and comes back now and
then. Compares a sample of the streams with an undisturbed instance. Fails if a verdict fell on a
rank that was not killed, or if a stream failed or differs.

    python -m benchmarks.false_verdicts --minutes 10 --neighbours 4
    python -m benchmarks.false_verdicts --minutes 10 --neighbours 0 --kill-every-s 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import uvloop

from benchmarks.gpu_serve_gaps import Window, errors, first_wrong, longest_gaps_ms
from benchmarks.gpu_serve_load import SteadyLoad, Turn
from cli.bench.fault_observer import FaultObserver
from cli.bench.stats import Spread
from cli.bench.stream_client import run_all, stream_client
from cli.bench.temporary_instance import temporary_instance
from cli.bench.temporary_options import TemporaryInstanceOptions
from shared.clock import SystemClock
from shared.errors import StarfishError, Unavailable
from shared.rank_signal import send_to_rank
from shared.types import Member

_SAMPLE = 320
_FORM_TIMEOUT_S = 120.0
_REPORT_S = 30.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--neighbours", type=int, default=4, help="processes that only compute")
    parser.add_argument("--kill-every-s", type=float, default=0.0, help="0: never")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=96)
    return parser.parse_args()


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """They end with this process, however it ends: a pipe that it holds is their lifeline."""
    theirs, ours = os.pipe()
    code = (
        "import os, sys, threading\n"
        "threading.Thread(target=lambda: (os.read(int(sys.argv[1]), 1), os._exit(0))).start()\n"
        "while True: pass\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(theirs)], pass_fds=[theirs])
        for _ in range(count)
    ]
    os.close(theirs)
    try:
        yield
    finally:
        os.close(ours)
        for process in processes:
            process.wait()


class Measurement:
    """One run. The attributes grow while it lasts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._clock = SystemClock()
        self._own = TemporaryInstanceOptions(ranks=args.ranks, device="cpu")
        self.killed: list[Member] = []
        self.not_back = 0
        self.verdicts: frozenset[Member] = frozenset()
        self.turns: Sequence[Turn] = ()
        self.gap_ms = Spread.of([])
        self.wrong = 0
        self.num_checked = 0

    async def run(self) -> None:
        """Raises Unavailable."""
        own, clock = self._own, self._clock
        async with temporary_instance(own.flags(), environment=own.environment()) as target:
            if target.url is None:
                raise Unavailable("the instance has no gateway")
            async with (
                stream_client(target.url, clock) as client,
                FaultObserver.watching(target) as observer,
            ):
                await observer.wait_until_all_ranks_in_map(_FORM_TIMEOUT_S)
                args = self._args
                load = SteadyLoad(
                    client,
                    clock,
                    streams=args.streams,
                    prompt_tokens=32,
                    new_tokens=args.new_tokens,
                    seed=1 << 32,
                )
                self.turns = load.turns
                began = clock.now()
                with busy_neighbours(args.neighbours):
                    async with asyncio.TaskGroup() as tasks:
                        loading = tasks.create_task(load.run())
                        reports = tasks.create_task(self._report(observer, load))
                        await self._disturb(observer, began + args.minutes * 60.0)
                        loading.cancel()
                        reports.cancel()
                now = clock.now()
                gaps = longest_gaps_ms(load.turns, Window(begin=began, end=now), now)
                self.gap_ms = Spread.of(gaps)
                self.verdicts = observer.verdicts()
        own = own.without_cache()
        async with temporary_instance(own.flags(), environment=own.environment()) as target:
            assert target.url is not None
            async with stream_client(target.url, clock) as client:
                ended = [turn for turn in self.turns if turn.record.finish is not None]
                sample = ended[:: max(1, len(ended) // _SAMPLE)]
                for first in range(0, len(sample), self._args.streams):
                    batch = sample[first : first + self._args.streams]
                    prompts = [turn.prompt for turn in batch]
                    answers = await run_all(client, prompts, self._args.new_tokens)
                    for turn, answer in zip(batch, answers, strict=True):
                        ids = answer.ids[: turn.wanted_tokens]
                        self.wrong += first_wrong(turn, ids) is not None
                self.num_checked = len(sample)

    async def _disturb(self, observer: FaultObserver, until: float) -> None:
        args, draw = self._args, random.Random(1)
        while (left_s := until - self._clock.now()) > 0.0:
            if not args.kill_every_s:
                await asyncio.sleep(left_s)
                continue
            await asyncio.sleep(min(left_s, args.kill_every_s))
            if not observer.are_all_ranks_in_map():
                self.not_back += 1
                continue
            victim = draw.choice(observer.members())
            self.killed.append(victim.member)
            send_to_rank(victim, signal.SIGKILL)

    async def _report(self, observer: FaultObserver, load: SteadyLoad) -> None:
        began = self._clock.now()
        while True:
            await asyncio.sleep(_REPORT_S)
            false = observer.verdicts() - set(self.killed)
            print(
                f"{self._clock.now() - began:5.0f} s  {len(load.turns)} streams, "
                f"{len(self.killed)} kills, {len(observer.verdicts())} verdicts, "
                f"{len(false)} of them false, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )

    def is_good(self) -> bool:
        false = self.verdicts - set(self.killed)
        failed = errors(self.turns)
        print(
            f"{len(self.turns)} streams, {len(failed)} failed, {self.wrong} of {self.num_checked} "
            f"wrong; {len(self.killed)} kills ({self.not_back} times the rank before was not back "
            f"in time), {len(self.verdicts)} verdicts, false: {sorted(map(str, false)) or 'none'}; "
            f"longest gap of a stream p50/p99/max {'/'.join(self.gap_ms.cells())} ms"
        )
        for text in sorted(set(failed))[:3]:
            print(f"  failed: {text}")
        return not (false or failed or self.wrong)


def main() -> int:
    measurement = Measurement(parse())
    ended = False
    try:
        uvloop.run(measurement.run())
        ended = True
    except* StarfishError as group:
        print(f"false_verdicts: {group.exceptions[0]}", file=sys.stderr)
    return 0 if ended and measurement.is_good() else 1


if __name__ == "__main__":
    sys.exit(main())
