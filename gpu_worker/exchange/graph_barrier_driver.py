"""Carries a `GraphAccord` between the two threads of a rank: the event loop, which hears of maps,
verdicts and peers, and the engine thread, which launches graphs. Decides nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from gpu_worker.exchange.graph_barrier import GraphAccord
from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, Step
from shared.wire import GraphNews

log = structlog.get_logger()

Release = Callable[[Collection[Member], Epoch], None]
"""Let kernels wait for these lives no longer; the map of this epoch is without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConductorDoors:
    """All called on the event loop, but `nudge`: from any thread."""

    tell: Callable[[GraphNews, Iterable[Member]], None]
    wake: Callable[[Step], None]  # of all other members
    nudge: Callable[[], None]  # the engine looks again whether it may go on
    held: Callable[[Epoch], None]  # nobody can deliver a step of this map any more
    leave: Callable[[str], None]


class GraphConductor:
    def __init__(self, member: Member, release: Release, loop: asyncio.AbstractEventLoop) -> None:
        self._accord = GraphAccord(member)
        self._release = release
        self._loop = loop
        self._releaser = ThreadPoolExecutor(1, thread_name_prefix="release")
        self._lock = threading.Lock()
        self._doors: ConductorDoors | None = None
        self._newest: ExpertMap | None = None
        self._peers: frozenset[Member] = frozenset()
        self._held: Epoch | None = None

    def attach(self, doors: ConductorDoors) -> None:
        self._doors = doors

    # On the event loop ---------------------------------------------------------------------------

    def hear(self, expert_map: ExpertMap) -> None:
        """As soon as a map is seen, whether or not it can be adopted yet. Maps without this rank,
        and old ones, are none."""
        newest = self._newest
        own = self._accord.own.member
        if not expert_map.has(own) or (newest and expert_map.epoch <= newest.epoch):
            return
        self._newest = expert_map
        with self._lock:
            heard = self._accord.hear(expert_map)
        if heard.leave:
            self._open.leave(f"the map of epoch {expert_map.epoch} begins anew with this rank")
            return
        self._peers = frozenset(expert_map.members) - {own}
        self._tell()
        if heard.give_up:
            self._let_go(
                heard.give_up, expert_map.epoch, lambda: self._accord.gave_up(heard.give_up)
            )

    def condemn(self, dead: Member, epoch: Epoch) -> None:
        """A verdict: the map of `epoch`, which may not be there yet, is without this life."""
        self._let_go([dead], epoch, lambda: self._accord.condemn(dead, epoch))

    def _let_go(self, members: Collection[Member], epoch: Epoch, then: Callable[[], None]) -> None:
        """On a thread of its own, for a card in trouble may not answer; only what has been done is
        told."""

        def work() -> None:
            self._release(members, epoch)
            with self._lock:
                then()
            self._loop.call_soon_threadsafe(self._tell)

        self._releaser.submit(work).add_done_callback(self._on_let_go)

    def _on_let_go(self, done: Future[None]) -> None:
        if (error := done.exception()) is not None:
            self._loop.call_soon_threadsafe(self._open.leave, f"the card fails: {error}")

    def on_news(self, news: GraphNews) -> None:
        with self._lock:
            self._accord.on_news(news)
        self._look_again()

    def greet(self, peer: Member) -> None:
        """A link to this peer has been opened; what was said before may not have reached it."""
        self._open.tell(self._accord.own, [peer])

    def hold(self, epoch: Epoch) -> None:
        """Answered by `held` once no living member can deliver a step of this map."""
        self._held = max(self._held or epoch, epoch)
        self._look_again()

    # On the engine thread ------------------------------------------------------------------------

    def launch_towards(self, expert_map: ExpertMap) -> bool:
        """Whether one more empty graph is to be launched before this map is adopted."""
        with self._lock:
            at = self._accord.join_at(expert_map)
            is_joiner = self._accord.own.member.rank in expert_map.joiners
            if at is None or is_joiner or self._accord.launched >= at:
                return False
            self._accord.launch()
            return True

    def may_adopt(self, expert_map: ExpertMap) -> bool:
        """To be asked where nothing is to be launched towards this map; the others hear of that."""
        with self._lock:
            if self._accord.join_at(expert_map) is None:
                return False
            before = self._accord.own
            self._accord.pause(expert_map)
            changed = self._accord.own is not before
            may_adopt = self._accord.may_adopt(expert_map)
        if changed:
            self._loop.call_soon_threadsafe(self._tell)
        return may_adopt

    def adopt(self, expert_map: ExpertMap, take: Callable[[], None]) -> Step:
        """The number of its first graph here. `take` makes kernels wait for its members, before
        anybody hears of it; it may take its time. Raises StepAbandoned where the members do not
        meet in this map."""
        with self._lock:
            self._accord.adopt(expert_map)
        take()
        with self._lock:
            self._accord.enter()
            first = Step(self._accord.launched)
        self._loop.call_soon_threadsafe(self._tell)
        return first

    def claim(self, *, ahead: bool = False) -> bool:
        """Counts the next graph as launched, if it may be. `ahead`: while the last is in flight."""
        accord = self._accord
        with self._lock:
            if not (accord.may_launch_ahead() if ahead else accord.may_launch()):
                return False
            self._accord.launch()
            overslept, launched = self._accord.has_overslept(), self._accord.launched
        if overslept:
            self._loop.call_soon_threadsafe(self._oversleep, launched)
        return True

    def awaited(self) -> list[Member]:
        """Where nothing may be adopted or launched: whom this rank waits for, if for anybody."""
        with self._lock:
            return self._accord.awaited()

    def land(self) -> None:
        """The first of the graphs in flight has ended, to whatever end."""
        with self._lock:
            before = self._accord.own
            self._accord.land()
            changed = self._accord.own is not before
        if changed:
            self._loop.call_soon_threadsafe(self._tell)

    def commit(self, *, had_work: bool) -> bool:
        """The graph that landed last was committed. Whether all sleep now."""
        with self._lock:
            before = self._accord.own
            self._accord.note_step(had_work=had_work)
            asleep = self._accord.falls_asleep()
            overslept = not asleep and self._accord.has_overslept()
            launched = self._accord.launched
            changed = self._accord.own is not before
        if overslept:
            self._loop.call_soon_threadsafe(self._oversleep, launched)
        elif changed:
            self._loop.call_soon_threadsafe(self._tell)
        return asleep

    # ---------------------------------------------------------------------------------------------

    @property
    def _open(self) -> ConductorDoors:
        assert self._doors is not None, "attach comes first"
        return self._doors

    def _oversleep(self, launched: int) -> None:
        self._open.wake(Step(launched))
        self._tell()

    def _tell(self) -> None:
        self._open.tell(self._accord.own, self._peers)
        self._look_again()

    def _look_again(self) -> None:
        with self._lock:
            overslept = self._accord.has_overslept()
            launched = self._accord.launched
            clear = self._held is not None and self._accord.is_clear_of(self._held)
        if overslept:
            self._oversleep(launched)
        if clear and self._held is not None:
            held, self._held = self._held, None
            self._open.held(held)
        self._open.nudge()
