"""Random schedules of faults, and the invariants that every one of them must leave standing. One
seed is one schedule, to the last message."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import numpy as np

from shared.expert_map import ExpertMap
from shared.records import unpack_map
from shared.store import WatchEvent
from tests.sim.sim_loop import SimLoop, resume
from tests.sim.world import ETCD, World, WorldSizes

FAULTS_WITHIN_S = 2.0
SETTLE_S = 90.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule did and how it ended, for the report of a failing seed."""

    seed: int
    faults: tuple[str, ...]
    epochs: int
    moves: int


class MapWatcher:
    """Checks every map at the moment of its publication (invariants 3, 4 and 6)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._last: ExpertMap | None = None
        self.num_maps = 0
        publish = world.etcd._publish

        def seen(event: WatchEvent) -> None:
            if event.key == world.keys.map and event.value is not None:
                self._check(unpack_map(event.value))
            publish(event)

        world.etcd._publish = seen  # type: ignore[method-assign]

    def _check(self, new: ExpertMap) -> None:
        last, self._last = self._last, new
        self.num_maps += 1
        assert not new.uncovered(), f"epoch {new.epoch} leaves experts out"
        assert len({m.rank for m in new.members}) == len(new.members)
        if last is None:
            return
        assert new.epoch == last.epoch + 1, f"epoch {new.epoch} after {last.epoch}"
        if new.cause.startswith("dead"):
            self._check_moves(last, new)

    def _check_moves(self, last: ExpertMap, new: ExpertMap) -> None:
        """A death moves no surviving replica, unless an orphan took a surplus one's slot."""
        for member in new.members:
            if not last.has(member):
                continue
            before, after = last.placement[:, member.rank], new.placement[:, member.rank]
            changed = (before >= 0) & (after != before)
            for layer, slot in np.argwhere(changed):
                survivors = [m.rank for m in new.members if last.has(m)]
                others = last.placement[layer, survivors]
                orphan = after[layer, slot]
                assert orphan < 0 or orphan not in others, "a surviving replica was moved"


class Schedule:
    """Draws faults from the seed and does them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._draw = random.Random(world.seed * 7919 + 13)
        self.done: list[str] = []

    async def run(self) -> None:
        kinds = [
            self._kill_rank,
            self._kill_rank,
            self._kill_two,
            self._stop_rank,
            self._cut_pair,
            self._cut_off_rank,
            self._kill_leader,
            self._lose_etcd,
        ]
        times = sorted(
            self._draw.uniform(0.0, FAULTS_WITHIN_S) for _ in range(self._draw.randint(1, 4))
        )
        now = 0.0
        async with asyncio.TaskGroup() as tasks:
            for at in times:
                await asyncio.sleep(at - now)
                now = at
                tasks.create_task(self._draw.choice(kinds)())

    def _say(self, text: str) -> None:
        self.done.append(f"{self._world.clock.now() - 1000:.3f} {text}")

    def _rank(self) -> int:
        return self._draw.randrange(self._world.sizes.num_ranks)

    async def _kill_rank(self) -> None:
        rank = self._rank()
        self._say(f"kill rank {rank}")
        self._world.kill_rank(rank)

    async def _kill_two(self) -> None:
        first, second = self._draw.sample(range(self._world.sizes.num_ranks), 2)
        pause_s = self._draw.choice([0.0, self._draw.uniform(0.0, 0.02)])
        self._say(f"kill ranks {first} and, {pause_s * 1000:.1f} ms later, {second}")
        self._world.kill_rank(first)
        await asyncio.sleep(pause_s)
        self._world.kill_rank(second)

    async def _stop_rank(self) -> None:
        rank, seconds = self._rank(), self._draw.choice([0.03, 0.1, 0.3, 2.0])
        process = self._world.process_of(rank)
        if process is None:
            return
        self._say(f"stop rank {rank} for {seconds} s")
        self._world.agents[rank].stop_rank()
        await asyncio.sleep(seconds)
        if not process.dead:
            resume(process, self._world.loop)

    async def _cut_pair(self) -> None:
        a, b = self._draw.sample(self._world.hosts(), 2)
        await self._cut([(a, b)], f"cut {a} from {b}")

    async def _cut_off_rank(self) -> None:
        alone = self._world.host_of_rank(self._rank())
        others = [h for h in self._world.hosts() if h != alone]
        await self._cut([(alone, h) for h in others], f"cut {alone} off")

    async def _cut(self, pairs: list[tuple[str, str]], text: str) -> None:
        seconds = self._draw.choice([0.05, 0.3, 1.0, 4.0, 8.0])
        self._say(f"{text} for {seconds} s")
        for a, b in pairs:
            self._world.sever(a, b)
        await asyncio.sleep(seconds)
        self._world.heal()

    async def _kill_leader(self) -> None:
        number = self._draw.randrange(self._world.sizes.num_control_planes)
        self._say(f"kill control plane {number}")
        self._world.kill_control_plane(number)
        await asyncio.sleep(self._draw.uniform(0.1, 1.0))
        self._world.start_control_plane(number)

    async def _lose_etcd(self) -> None:
        seconds = self._draw.choice([0.1, 1.0, 3.0, 7.0])
        self._say(f"lose {ETCD} for {seconds} s")
        self._world.cut_etcd()
        await asyncio.sleep(seconds)
        self._world.heal()


async def traffic(world: World) -> None:
    """Sessions that come and go while things break; a few are cancelled."""
    for _ in range(world.draw.randint(6, 12)):
        await asyncio.sleep(world.draw.uniform(0.0, 0.25))
        prompt = tuple(world.draw.randrange(90) for _ in range(world.draw.randint(1, 24)))
        client = world.send(prompt, world.draw.randint(1, 40))
        if world.draw.random() < 0.1:
            await asyncio.sleep(world.draw.uniform(0.0, 0.1))
            world.cancel(client)


def check_sessions(world: World) -> None:
    """Invariants 1, 2 and 9: what a client has is what the oracle says, and it has an end."""
    for client in world.clients:
        session = client.session
        assert session is not None
        got = tuple(session.emitted)
        assert got == client.expected[: len(got)], f"{session.id}: {got} != {client.expected}"
        assert session.ended, f"{session.id} never ended"
        if not client.cancelled:
            assert session.failure is None, f"{session.id}: {session.failure}"
            assert len(got) == client.num_tokens, f"{session.id} lost tokens"


def run_schedule(seed: int, sizes: WorldSizes | None = None) -> Outcome:
    """Raises AssertionError, TimeoutError or what a service raised, where an invariant fell."""
    loop = SimLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_run(seed, loop, sizes or WorldSizes()))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _run(seed: int, loop: SimLoop, sizes: WorldSizes) -> Outcome:
    world = World(seed=seed, loop=loop, sizes=sizes)
    maps = MapWatcher(world)
    await world.start()
    schedule = Schedule(world)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(traffic(world))
            tasks.create_task(schedule.run())
        world.heal()
        await world.until(world.all_ended, SETTLE_S)
        await world.until(world.all_live, SETTLE_S)
        check_sessions(world)
    except BaseException as error:
        error.add_note(f"seed {seed}: " + "; ".join(schedule.done))
        raise
    moves = sum(c.session.moves for c in world.clients if c.session is not None)
    return Outcome(seed, tuple(schedule.done), maps.num_maps, moves)
