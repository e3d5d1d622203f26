"""The failure detector: every signal in every state, and the guards against our own blindness."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from control_plane.failure_detector import DetectorTimings, FailureDetector
from control_plane.verdicts import Alarm, AlarmKind, Dead, Judgement
from shared.records import Suspicion
from shared.types import Epoch, Incarnation, Member, RankId, Step, SuspicionReason
from shared.wire import Load, Pong

TIMINGS = DetectorTimings()
LOAD = Load(running=0, waiting=0, tokens=0, kv_blocks_free=1, kv_blocks=1)


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


def suspicion(
    rank: int, reason: SuspicionReason = SuspicionReason.EXCHANGE, by: str = "rank-9"
) -> Suspicion:
    return Suspicion(
        rank=RankId(rank),
        incarnation=Incarnation(1),
        by=by,
        reason=reason,
        epoch=Epoch(1),
        step=Step(1),
        raised_at=0.0,
    )


class Bench:
    """A detector with members 0 … n-1, all registered, connected and heard of at the start."""

    def __init__(self, count: int = 4, timings: DetectorTimings = TIMINGS) -> None:
        self.now = 100.0
        self.detector = FailureDetector(timings, self.now)
        self.news: list[Judgement] = []
        self.members = [member(rank) for rank in range(count)]
        self.step = 1
        for one in self.members:
            self.take(self.detector.on_record(one, self.now))
        self.take(self.detector.on_members(self.members, self.now))
        for one in self.members:
            self.take(self.detector.on_probe_standing(one, self.now))
            self.pong(one.rank)

    def take(self, judgements: list[Judgement]) -> None:
        self.news += judgements

    def pong(
        self,
        rank: int,
        *,
        engine_age_ms: float = 0.0,
        waiting_for: tuple[int, ...] = (),
        step: int | None = None,
    ) -> None:
        pong = Pong(
            nonce=1,
            rank=RankId(rank),
            incarnation=Incarnation(1),
            epoch=Epoch(1),
            step=Step(self.step if step is None else step),
            engine_age_ms=engine_age_ms,
            waiting_for=tuple(RankId(r) for r in waiting_for),
            load=LOAD,
        )
        self.take(self.detector.on_pong(member(rank), pong, self.now))

    def suspect(self, rank: int, reason: SuspicionReason = SuspicionReason.EXCHANGE) -> None:
        self.take(self.detector.on_suspicion(suspicion(rank, reason), self.now))

    def lose_lease(self, *ranks: int) -> None:
        for rank in ranks:
            self.take(self.detector.on_record_gone(member(rank), self.now))

    def pass_time(
        self, seconds: float, *answering: int, engine_age_ms: float = 0.0, tick_s: float = 0.01
    ) -> None:
        """In ticks, with a Pong of each of `answering` in each."""
        for _ in range(round(seconds / tick_s)):
            self.now += tick_s
            for rank in answering:
                self.pong(rank, engine_age_ms=engine_age_ms)
            self.take(self.detector.on_tick(self.now))

    @property
    def dead(self) -> dict[int, SuspicionReason]:
        return {n.member.rank: n.cause for n in self.news if isinstance(n, Dead)}

    @property
    def alarms(self) -> list[AlarmKind]:
        return [n.kind for n in self.news if isinstance(n, Alarm)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_peace_judges_nobody(bench: Bench) -> None:
    bench.pass_time(10.0, 0, 1, 2, 3, tick_s=0.1)
    assert bench.news == []
    assert not bench.detector.urgent


def test_an_exit_is_a_death_at_once_though_probes_answer(bench: Bench) -> None:
    bench.suspect(2, SuspicionReason.EXIT)
    assert bench.dead == {2: SuspicionReason.EXIT}


def test_a_death_is_told_once(bench: Bench) -> None:
    bench.suspect(2, SuspicionReason.EXIT)
    bench.suspect(2, SuspicionReason.EXIT)
    bench.lose_lease(2)
    bench.pass_time(1.0, 0, 1, 3)
    assert len(bench.news) == 1


def test_a_suspicion_alone_is_no_death_and_a_vouching_pong_ends_it(bench: Bench) -> None:
    bench.suspect(1)
    assert bench.detector.urgent
    bench.pass_time(0.02, 0, 1, 2, 3)
    assert not bench.detector.urgent
    bench.pass_time(1.0, 0, 1, 2, 3)
    assert bench.news == []


@pytest.mark.parametrize("reason", list(SuspicionReason))
def test_a_suspected_member_that_is_silent_for_the_window_is_dead(
    bench: Bench, reason: SuspicionReason
) -> None:
    bench.suspect(1, reason)
    if reason is not SuspicionReason.EXIT:
        stopped = reason is SuspicionReason.STOPPED
        window_s = TIMINGS.stopped_s if stopped else TIMINGS.window_s
        bench.pass_time(window_s - 0.02, 0, 2, 3)
        assert bench.dead == {}
        bench.pass_time(0.04, 0, 2, 3)
    assert bench.dead == {1: reason}


def test_a_stopped_process_that_goes_on_in_time_lives(bench: Bench) -> None:
    bench.suspect(1, SuspicionReason.STOPPED)
    bench.pass_time(TIMINGS.stopped_s - 0.02, 0, 2, 3)
    bench.pass_time(1.0, 0, 1, 2, 3)
    assert bench.dead == {}


def test_a_stuck_engine_is_silence_though_the_event_loop_answers(bench: Bench) -> None:
    bench.suspect(1)
    for _ in range(30):
        bench.pong(1, engine_age_ms=(bench.now - 99.0) * 1000)
        bench.pass_time(0.01, 0, 2, 3)
    assert bench.dead == {1: SuspicionReason.EXCHANGE}


def test_a_rank_that_only_waits_for_its_peers_is_fine(bench: Bench) -> None:
    for _ in range(100):
        bench.suspect(1)
        bench.pong(1, engine_age_ms=2.0, waiting_for=(3,))
        bench.pass_time(0.02, 0, 2, 3)
    assert bench.news == []


def test_a_pong_from_before_the_suspicion_does_not_vouch(bench: Bench) -> None:
    bench.pass_time(0.1, 0, 1, 2, 3)
    bench.suspect(1)
    bench.pong(1, engine_age_ms=50.0)
    assert bench.detector.suspected == (member(1),)


def test_silence_of_peace_makes_us_suspect_by_ourselves(bench: Bench) -> None:
    bench.pass_time(TIMINGS.quiet_s + TIMINGS.window_s + 0.5, 0, 2, 3, tick_s=0.02)
    assert bench.dead == {1: SuspicionReason.SILENCE}


def test_a_refused_probe_is_a_death_at_once(bench: Bench) -> None:
    bench.take(bench.detector.on_probe_refused(member(3), bench.now))
    assert bench.dead == {3: SuspicionReason.RESET}


def test_a_broken_probe_alone_is_a_suspicion(bench: Bench) -> None:
    bench.take(bench.detector.on_probe_broken(member(3), bench.now))
    assert bench.dead == {}
    bench.take(bench.detector.on_probe_standing(member(3), bench.now))
    bench.pass_time(0.05, 0, 1, 2, 3)
    assert bench.dead == {}
    assert not bench.detector.urgent


@pytest.mark.parametrize("probe_first", [True, False])
@pytest.mark.parametrize(
    "reason", [SuspicionReason.RESET, SuspicionReason.LINK, SuspicionReason.EXCHANGE]
)
def test_a_broken_probe_and_somebody_elses_doubt_is_a_death_at_once(
    bench: Bench, probe_first: bool, reason: SuspicionReason
) -> None:
    signals: list[Callable[[], None]] = [
        lambda: bench.take(bench.detector.on_probe_broken(member(3), bench.now)),
        lambda: bench.suspect(3, reason),
    ]
    for signal in signals if probe_first else reversed(signals):
        signal()
    assert set(bench.dead) == {3}


def test_a_lost_lease_and_a_broken_probe_is_a_death_at_once(bench: Bench) -> None:
    bench.take(bench.detector.on_probe_broken(member(0), bench.now))
    bench.lose_lease(0)
    assert bench.dead == {0: SuspicionReason.LEASE}


def test_a_rank_that_answers_without_a_lease_has_a_moment_to_register_again(bench: Bench) -> None:
    bench.lose_lease(0)
    bench.pass_time(0.05, 0, 1, 2, 3)
    bench.take(bench.detector.on_record(member(0), bench.now))
    bench.pass_time(1.0, 0, 1, 2, 3)
    assert bench.news == []


def test_a_rank_that_answers_but_stays_without_a_lease_is_dead(bench: Bench) -> None:
    bench.lose_lease(0)
    bench.pass_time(TIMINGS.settle_s - 0.02, 0, 1, 2, 3)
    assert bench.dead == {}
    bench.pass_time(0.05, 0, 1, 2, 3)
    assert bench.dead == {0: SuspicionReason.LEASE}


def test_leases_that_expire_in_masses_freeze_the_map_while_ranks_answer(bench: Bench) -> None:
    bench.lose_lease(0, 1, 2)
    bench.pass_time(30.0, 0, 1, 2, 3)
    assert bench.dead == {}
    assert bench.alarms == [AlarmKind.MASS_EXPIRY]
    assert bench.detector.frozen
    for rank in (0, 1, 2):
        bench.take(bench.detector.on_record(member(rank), bench.now))
    assert not bench.detector.frozen
    bench.pass_time(1.0, 0, 1, 2, 3)
    assert bench.dead == {}


def test_in_a_mass_expiry_the_last_to_register_is_not_punished(bench: Bench) -> None:
    bench.lose_lease(0, 1, 2)
    bench.pass_time(0.3, 0, 1, 2, 3)
    for rank in (0, 1):
        bench.take(bench.detector.on_record(member(rank), bench.now))
    bench.pass_time(5.0, 0, 1, 2, 3)
    assert bench.dead == {}
    assert bench.detector.frozen


def test_in_a_mass_expiry_exits_and_refusals_still_kill(bench: Bench) -> None:
    bench.lose_lease(0, 1, 2)
    bench.pass_time(0.3, 0, 1, 2, 3)
    bench.suspect(0, SuspicionReason.EXIT)
    bench.take(bench.detector.on_probe_refused(member(1), bench.now))
    assert set(bench.dead) == {0, 1}


def test_many_leases_gone_with_broken_probes_are_many_deaths(bench: Bench) -> None:
    for rank in (0, 1, 2):
        bench.take(bench.detector.on_probe_broken(member(rank), bench.now))
        bench.lose_lease(rank)
    assert set(bench.dead) == {0, 1, 2}
    assert bench.alarms == []


def test_when_most_fall_silent_at_once_it_may_be_us(bench: Bench) -> None:
    bench.suspect(1)
    bench.pass_time(2.0, 3)
    assert bench.dead == {}
    assert bench.alarms == [AlarmKind.OWN_LINK]
    bench.pass_time(0.1, 0, 1, 2, 3)
    assert bench.dead == {}
    assert not bench.detector.urgent


def test_pongs_of_peace_that_are_older_than_the_window_are_not_silence(bench: Bench) -> None:
    bench.pass_time(0.5, tick_s=0.1)
    bench.suspect(1)
    bench.pass_time(0.3, 0, 2, 3)
    assert bench.alarms == []
    assert set(bench.dead) == {1}


def test_half_of_the_members_silent_is_not_most(bench: Bench) -> None:
    bench.suspect(1)
    bench.suspect(2)
    bench.pass_time(0.3, 0, 3)
    assert set(bench.dead) == {1, 2}


def test_our_own_stall_is_not_their_silence(bench: Bench) -> None:
    bench.suspect(1)
    bench.now += 5.0
    bench.take(bench.detector.on_tick(bench.now))
    assert bench.dead == {}
    bench.pass_time(0.05, 0, 1, 2, 3)
    assert bench.news == []


def test_our_own_stall_in_peace_raises_no_doubt(bench: Bench) -> None:
    bench.now += 60.0
    bench.take(bench.detector.on_tick(bench.now))
    assert not bench.detector.urgent


def test_a_successor_proves_the_death(bench: Bench) -> None:
    bench.take(bench.detector.on_record(member(2, 2), bench.now))
    assert bench.dead == {2: SuspicionReason.EXIT}


def test_a_new_leader_finds_members_without_a_record_dead() -> None:
    bench = Bench(1)
    bench.take(bench.detector.on_members([member(0), member(1)], bench.now))
    bench.pass_time(TIMINGS.settle_s - 0.02, 0)
    assert bench.news == [], "nobody can ask it: its silence says nothing"
    bench.pass_time(0.05, 0)
    assert bench.dead == {1: SuspicionReason.LEASE}


def leader_after_an_outage_of_etcd() -> Bench:
    """Every lease has expired meanwhile: nobody can be asked before it registers again."""
    bench = Bench(0)
    bench.take(bench.detector.on_members([member(rank) for rank in range(4)], bench.now))
    return bench


def test_leases_that_all_expired_before_a_new_leader_came_are_no_deaths() -> None:
    bench = leader_after_an_outage_of_etcd()
    bench.pass_time(TIMINGS.patience_s - 1.0)
    assert bench.detector.frozen
    for rank in range(4):
        bench.take(bench.detector.on_record(member(rank), bench.now))
    bench.pass_time(2.0, 0, 1, 2, 3)
    assert bench.dead == {}
    assert bench.alarms == [AlarmKind.MASS_EXPIRY]
    assert not bench.detector.frozen


def test_after_a_mass_expiry_who_neither_registers_nor_answers_is_dead_in_the_end() -> None:
    bench = leader_after_an_outage_of_etcd()
    bench.take(bench.detector.on_record(member(0), bench.now))
    bench.pass_time(TIMINGS.patience_s - 0.1, 0, 1)
    assert bench.dead == {}
    bench.pass_time(1.0, 0, 1)
    assert set(bench.dead) == {2, 3}


def test_leases_that_expire_within_a_keep_alive_interval_of_each_other_are_a_mass(
    bench: Bench,
) -> None:
    for rank in range(4):
        bench.lose_lease(rank)
        bench.pass_time(TIMINGS.settle_s / 4, 0, 1, 2, 3)
    bench.pass_time(5.0, 0, 1, 2, 3)
    assert bench.dead == {}
    assert bench.detector.frozen


def test_processes_that_are_known_to_be_stopped_are_not_our_own_deafness(bench: Bench) -> None:
    for rank in (0, 1, 2):
        bench.suspect(rank, SuspicionReason.STOPPED)
    bench.pass_time(1.0, 3)
    assert set(bench.dead) == {0, 1, 2}
    assert bench.alarms == []


def test_signals_about_strangers_and_former_lives_are_ignored(bench: Bench) -> None:
    stranger = member(7)
    for news in (
        bench.detector.on_suspicion(suspicion(7, SuspicionReason.EXIT), bench.now),
        bench.detector.on_probe_broken(stranger, bench.now),
        bench.detector.on_probe_refused(stranger, bench.now),
        bench.detector.on_probe_standing(stranger, bench.now),
        bench.detector.on_record_gone(stranger, bench.now),
    ):
        assert news == []
    bench.take(bench.detector.on_members([member(1)], bench.now))
    bench.suspect(0, SuspicionReason.EXIT)
    assert bench.dead == {}


def test_two_ranks_that_cannot_reach_each_other_lose_the_more_waited_for(bench: Bench) -> None:
    for _ in range(round(TIMINGS.stuck_s / 0.02) + 10):
        bench.now += 0.02
        if not bench.dead:
            bench.suspect(1)
            bench.suspect(2)
        bench.pong(0, waiting_for=(1,))
        bench.pong(1, waiting_for=(2,))
        bench.pong(2, waiting_for=(1,))
        bench.pong(3, waiting_for=(1,))
        bench.take(bench.detector.on_tick(bench.now))
    assert bench.dead == {1: SuspicionReason.LINK}


def test_a_slow_first_step_after_a_long_sleep_is_not_stuck(bench: Bench) -> None:
    bench.pass_time(10 * TIMINGS.stuck_s, 0, 1, 2, 3, tick_s=0.1)
    bench.suspect(1)
    for _ in range(round(0.5 / 0.02)):
        bench.now += 0.02
        for rank in range(4):
            bench.pong(rank, waiting_for=() if rank == 1 else (1,))
        bench.take(bench.detector.on_tick(bench.now))
        bench.suspect(1)
    assert bench.dead == {}


def test_a_wait_that_was_told_before_we_went_deaf_is_not_a_stuck_step() -> None:
    bench = Bench(2)
    bench.suspect(1)
    bench.pong(0, waiting_for=(1,))
    bench.pong(1, engine_age_ms=5.0)
    bench.pass_time(3 * TIMINGS.stuck_s)
    assert bench.dead == {}
    bench.step += 1
    bench.pass_time(1.0, 0, 1)
    assert bench.dead == {}


def test_waiting_without_progress_is_fine_while_orphans_load(bench: Bench) -> None:
    bench.suspect(1)
    for _ in range(1000):
        bench.now += 0.02
        for rank in range(4):
            bench.pong(rank, waiting_for=() if rank == 1 else (1,))
        bench.take(bench.detector.on_tick(bench.now, steps_may_rest=True))
        bench.suspect(1)
    assert bench.dead == {}


def test_an_idle_instance_with_an_old_accusation_is_fine(bench: Bench) -> None:
    bench.suspect(1)
    bench.pass_time(60.0, 0, 1, 2, 3, tick_s=0.1)
    assert bench.dead == {}


def test_a_verdict_carries_its_signals_and_times(bench: Bench) -> None:
    began_at = bench.now
    bench.suspect(1)
    bench.pass_time(0.05, 0, 2, 3)
    bench.suspect(1, SuspicionReason.LINK)
    bench.pass_time(0.3, 0, 2, 3)
    (dead,) = [n for n in bench.news if isinstance(n, Dead)]
    assert dead.first_signal_at == began_at
    assert began_at + TIMINGS.window_s <= dead.decided_at <= began_at + TIMINGS.window_s + 0.03
    assert [s.reason for s in dead.signals] == [SuspicionReason.EXCHANGE, SuspicionReason.LINK]
