"""The failure detector: every signal in every state, and the guards against false verdicts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from control_plane.failure_detector import DetectorTimings, FailureDetector
from control_plane.judgements import Alarm, AlarmKind, Judgement
from shared.records import Suspicion, Verdict
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


class DetectorHarness:
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
            self.take(self.detector.on_probe_connected(one, self.now))
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
            self.take(self.detector.on_record_deleted(member(rank), self.now))

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
        return {n.member.rank: n.cause for n in self.news if isinstance(n, Verdict)}

    @property
    def alarms(self) -> list[AlarmKind]:
        return [n.kind for n in self.news if isinstance(n, Alarm)]


@pytest.fixture
def harness() -> DetectorHarness:
    return DetectorHarness()


def test_without_signals_nobody_is_declared_dead(harness: DetectorHarness) -> None:
    harness.pass_time(10.0, 0, 1, 2, 3, tick_s=0.1)
    assert harness.news == []
    assert not harness.detector.urgent


def test_an_exit_is_a_death_at_once_though_probes_answer(harness: DetectorHarness) -> None:
    harness.suspect(2, SuspicionReason.EXIT)
    assert harness.dead == {2: SuspicionReason.EXIT}


def test_a_death_is_told_once(harness: DetectorHarness) -> None:
    harness.suspect(2, SuspicionReason.EXIT)
    harness.suspect(2, SuspicionReason.EXIT)
    harness.lose_lease(2)
    harness.pass_time(1.0, 0, 1, 3)
    assert len(harness.news) == 1


def test_a_suspicion_alone_is_no_death_and_a_healthy_pong_ends_it(harness: DetectorHarness) -> None:
    harness.suspect(1)
    assert harness.detector.urgent
    harness.pass_time(0.02, 0, 1, 2, 3)
    assert not harness.detector.urgent
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.news == []


@pytest.mark.parametrize("reason", list(SuspicionReason))
def test_a_suspected_member_that_is_silent_for_the_window_is_dead(
    harness: DetectorHarness, reason: SuspicionReason
) -> None:
    harness.suspect(1, reason)
    if reason is not SuspicionReason.EXIT:
        stopped = reason is SuspicionReason.STOPPED
        window_s = TIMINGS.stopped_s if stopped else TIMINGS.window_s
        harness.pass_time(window_s - 0.02, 0, 2, 3)
        assert harness.dead == {}
        harness.pass_time(0.04, 0, 2, 3)
    assert harness.dead == {1: reason}


def test_a_stopped_process_that_goes_on_in_time_lives(harness: DetectorHarness) -> None:
    harness.suspect(1, SuspicionReason.STOPPED)
    harness.pass_time(TIMINGS.stopped_s - 0.02, 0, 2, 3)
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.dead == {}


def test_a_stuck_engine_is_silence_though_the_event_loop_answers(harness: DetectorHarness) -> None:
    harness.suspect(1)
    for _ in range(30):
        harness.pong(1, engine_age_ms=(harness.now - 99.0) * 1000)
        harness.pass_time(0.01, 0, 2, 3)
    assert harness.dead == {1: SuspicionReason.EXCHANGE}


def test_a_rank_that_only_waits_for_its_peers_is_fine(harness: DetectorHarness) -> None:
    for _ in range(100):
        harness.suspect(1)
        harness.pong(1, engine_age_ms=2.0, waiting_for=(3,))
        harness.pass_time(0.02, 0, 2, 3)
    assert harness.news == []


def test_a_pong_from_before_the_suspicion_does_not_clear_it(harness: DetectorHarness) -> None:
    harness.pass_time(0.1, 0, 1, 2, 3)
    harness.suspect(1)
    harness.pong(1, engine_age_ms=50.0)
    assert harness.detector.suspected == (member(1),)


def test_silence_without_signals_raises_our_own_suspicion(harness: DetectorHarness) -> None:
    harness.pass_time(TIMINGS.probe_silence_s + TIMINGS.window_s + 0.5, 0, 2, 3, tick_s=0.02)
    assert harness.dead == {1: SuspicionReason.SILENCE}


def test_a_refused_probe_is_a_death_at_once(harness: DetectorHarness) -> None:
    harness.take(harness.detector.on_probe_refused(member(3), harness.now))
    assert harness.dead == {3: SuspicionReason.RESET}


def test_a_broken_probe_alone_is_a_suspicion(harness: DetectorHarness) -> None:
    harness.take(harness.detector.on_probe_broken(member(3), harness.now))
    assert harness.dead == {}
    harness.take(harness.detector.on_probe_connected(member(3), harness.now))
    harness.pass_time(0.05, 0, 1, 2, 3)
    assert harness.dead == {}
    assert not harness.detector.urgent


@pytest.mark.parametrize("probe_first", [True, False])
@pytest.mark.parametrize(
    "reason", [SuspicionReason.RESET, SuspicionReason.LINK, SuspicionReason.EXCHANGE]
)
def test_a_broken_probe_and_a_peers_suspicion_is_a_death_at_once(
    harness: DetectorHarness, probe_first: bool, reason: SuspicionReason
) -> None:
    signals: list[Callable[[], None]] = [
        lambda: harness.take(harness.detector.on_probe_broken(member(3), harness.now)),
        lambda: harness.suspect(3, reason),
    ]
    for signal in signals if probe_first else reversed(signals):
        signal()
    assert set(harness.dead) == {3}


def test_a_lost_lease_and_a_broken_probe_is_a_death_at_once(harness: DetectorHarness) -> None:
    harness.take(harness.detector.on_probe_broken(member(0), harness.now))
    harness.lose_lease(0)
    assert harness.dead == {0: SuspicionReason.LEASE}


def test_a_rank_that_answers_without_a_lease_has_a_moment_to_register_again(
    harness: DetectorHarness,
) -> None:
    harness.lose_lease(0)
    harness.pass_time(0.05, 0, 1, 2, 3)
    harness.take(harness.detector.on_record(member(0), harness.now))
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.news == []


def test_a_rank_that_answers_but_stays_without_a_lease_is_dead(harness: DetectorHarness) -> None:
    harness.lose_lease(0)
    harness.pass_time(TIMINGS.reregister_timeout_s - 0.02, 0, 1, 2, 3)
    assert harness.dead == {}
    harness.pass_time(0.05, 0, 1, 2, 3)
    assert harness.dead == {0: SuspicionReason.LEASE}


def test_leases_that_expire_in_masses_freeze_the_map_while_ranks_answer(
    harness: DetectorHarness,
) -> None:
    harness.lose_lease(0, 1, 2)
    harness.pass_time(30.0, 0, 1, 2, 3)
    assert harness.dead == {}
    assert harness.alarms == [AlarmKind.MASS_EXPIRY]
    assert harness.detector.frozen
    for rank in (0, 1, 2):
        harness.take(harness.detector.on_record(member(rank), harness.now))
    assert not harness.detector.frozen
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.dead == {}


def test_in_a_mass_expiry_the_last_to_register_is_not_punished(harness: DetectorHarness) -> None:
    harness.lose_lease(0, 1, 2)
    harness.pass_time(0.3, 0, 1, 2, 3)
    for rank in (0, 1):
        harness.take(harness.detector.on_record(member(rank), harness.now))
    harness.pass_time(5.0, 0, 1, 2, 3)
    assert harness.dead == {}
    assert harness.detector.frozen


def test_in_a_mass_expiry_exits_and_refusals_still_kill(harness: DetectorHarness) -> None:
    harness.lose_lease(0, 1, 2)
    harness.pass_time(0.3, 0, 1, 2, 3)
    harness.suspect(0, SuspicionReason.EXIT)
    harness.take(harness.detector.on_probe_refused(member(1), harness.now))
    assert set(harness.dead) == {0, 1}


def test_many_leases_gone_with_broken_probes_are_many_deaths(harness: DetectorHarness) -> None:
    for rank in (0, 1, 2):
        harness.take(harness.detector.on_probe_broken(member(rank), harness.now))
        harness.lose_lease(rank)
    assert set(harness.dead) == {0, 1, 2}
    assert harness.alarms == []


def test_when_most_fall_silent_at_once_it_may_be_us(harness: DetectorHarness) -> None:
    harness.suspect(1)
    harness.pass_time(2.0, 3)
    assert harness.dead == {}
    assert harness.alarms == [AlarmKind.OWN_LINK]
    harness.pass_time(0.1, 0, 1, 2, 3)
    assert harness.dead == {}
    assert not harness.detector.urgent


def test_pongs_at_the_slow_probe_rate_older_than_the_window_are_not_silence(
    harness: DetectorHarness,
) -> None:
    harness.pass_time(0.5, tick_s=0.1)
    harness.suspect(1)
    harness.pass_time(0.3, 0, 2, 3)
    assert harness.alarms == []
    assert set(harness.dead) == {1}


def test_half_of_the_members_silent_is_not_most(harness: DetectorHarness) -> None:
    harness.suspect(1)
    harness.suspect(2)
    harness.pass_time(0.3, 0, 3)
    assert set(harness.dead) == {1, 2}


def test_our_own_stall_is_not_their_silence(harness: DetectorHarness) -> None:
    harness.suspect(1)
    harness.now += 5.0
    harness.take(harness.detector.on_tick(harness.now))
    assert harness.dead == {}
    harness.pass_time(0.05, 0, 1, 2, 3)
    assert harness.news == []


def test_our_own_stall_without_signals_raises_no_suspicion(harness: DetectorHarness) -> None:
    harness.now += 60.0
    harness.take(harness.detector.on_tick(harness.now))
    assert not harness.detector.urgent


def test_a_successor_proves_the_death(harness: DetectorHarness) -> None:
    harness.take(harness.detector.on_record(member(2, 2), harness.now))
    assert harness.dead == {2: SuspicionReason.EXIT}


def test_a_new_leader_finds_members_without_a_record_dead() -> None:
    harness = DetectorHarness(1)
    harness.take(harness.detector.on_members([member(0), member(1)], harness.now))
    harness.pass_time(TIMINGS.reregister_timeout_s - 0.02, 0)
    assert harness.news == [], "nobody can ask it: its silence says nothing"
    harness.pass_time(0.05, 0)
    assert harness.dead == {1: SuspicionReason.LEASE}


def leader_after_an_outage_of_etcd() -> DetectorHarness:
    """Every lease has expired meanwhile: nobody can be asked before it registers again."""
    harness = DetectorHarness(0)
    harness.take(harness.detector.on_members([member(rank) for rank in range(4)], harness.now))
    return harness


def test_leases_that_all_expired_before_a_new_leader_came_are_no_deaths() -> None:
    harness = leader_after_an_outage_of_etcd()
    harness.pass_time(TIMINGS.mass_expiry_grace_s - 1.0)
    assert harness.detector.frozen
    for rank in range(4):
        harness.take(harness.detector.on_record(member(rank), harness.now))
    harness.pass_time(2.0, 0, 1, 2, 3)
    assert harness.dead == {}
    assert harness.alarms == [AlarmKind.MASS_EXPIRY]
    assert not harness.detector.frozen


def test_after_a_mass_expiry_who_neither_registers_nor_answers_is_dead_in_the_end() -> None:
    harness = leader_after_an_outage_of_etcd()
    harness.take(harness.detector.on_record(member(0), harness.now))
    harness.pass_time(TIMINGS.mass_expiry_grace_s - 0.1, 0, 1)
    assert harness.dead == {}
    harness.pass_time(1.0, 0, 1)
    assert set(harness.dead) == {2, 3}


def test_leases_that_expire_within_a_keep_alive_interval_of_each_other_are_a_mass(
    harness: DetectorHarness,
) -> None:
    for rank in range(4):
        harness.lose_lease(rank)
        harness.pass_time(TIMINGS.reregister_timeout_s / 4, 0, 1, 2, 3)
    harness.pass_time(5.0, 0, 1, 2, 3)
    assert harness.dead == {}
    assert harness.detector.frozen


def test_processes_known_to_be_stopped_do_not_make_our_own_link_suspect(
    harness: DetectorHarness,
) -> None:
    for rank in (0, 1, 2):
        harness.suspect(rank, SuspicionReason.STOPPED)
    harness.pass_time(1.0, 3)
    assert set(harness.dead) == {0, 1, 2}
    assert harness.alarms == []


def test_signals_about_strangers_and_former_incarnations_are_ignored(
    harness: DetectorHarness,
) -> None:
    stranger = member(7)
    for news in (
        harness.detector.on_suspicion(suspicion(7, SuspicionReason.EXIT), harness.now),
        harness.detector.on_probe_broken(stranger, harness.now),
        harness.detector.on_probe_refused(stranger, harness.now),
        harness.detector.on_probe_connected(stranger, harness.now),
        harness.detector.on_record_deleted(stranger, harness.now),
    ):
        assert news == []
    harness.take(harness.detector.on_members([member(1)], harness.now))
    harness.suspect(0, SuspicionReason.EXIT)
    assert harness.dead == {}


def test_two_ranks_that_cannot_reach_each_other_lose_the_more_waited_for(
    harness: DetectorHarness,
) -> None:
    for _ in range(round(TIMINGS.stuck_s / 0.02) + 10):
        harness.now += 0.02
        if not harness.dead:
            harness.suspect(1)
            harness.suspect(2)
        harness.pong(0, waiting_for=(1,))
        harness.pong(1, waiting_for=(2,))
        harness.pong(2, waiting_for=(1,))
        harness.pong(3, waiting_for=(1,))
        harness.take(harness.detector.on_tick(harness.now))
    assert harness.dead == {1: SuspicionReason.LINK}


def test_a_slow_first_step_after_a_long_sleep_is_not_stuck(harness: DetectorHarness) -> None:
    harness.pass_time(10 * TIMINGS.stuck_s, 0, 1, 2, 3, tick_s=0.1)
    harness.suspect(1)
    for _ in range(round(0.5 / 0.02)):
        harness.now += 0.02
        for rank in range(4):
            harness.pong(rank, waiting_for=() if rank == 1 else (1,))
        harness.take(harness.detector.on_tick(harness.now))
        harness.suspect(1)
    assert harness.dead == {}


def test_a_wait_reported_before_our_own_link_was_suspect_is_not_a_stuck_step() -> None:
    harness = DetectorHarness(2)
    harness.suspect(1)
    harness.pong(0, waiting_for=(1,))
    harness.pong(1, engine_age_ms=5.0)
    harness.pass_time(3 * TIMINGS.stuck_s)
    assert harness.dead == {}
    harness.step += 1
    harness.pass_time(1.0, 0, 1)
    assert harness.dead == {}


def test_waiting_without_progress_is_fine_while_orphans_load(harness: DetectorHarness) -> None:
    harness.suspect(1)
    for _ in range(1000):
        harness.now += 0.02
        for rank in range(4):
            harness.pong(rank, waiting_for=() if rank == 1 else (1,))
        harness.take(harness.detector.on_tick(harness.now, steps_paused=True))
        harness.suspect(1)
    assert harness.dead == {}


def test_an_idle_instance_with_an_old_accusation_is_fine(harness: DetectorHarness) -> None:
    harness.suspect(1)
    harness.pass_time(60.0, 0, 1, 2, 3, tick_s=0.1)
    assert harness.dead == {}


def test_a_verdict_carries_its_signals_and_times(harness: DetectorHarness) -> None:
    began_at = harness.now
    harness.suspect(1)
    harness.pass_time(0.05, 0, 2, 3)
    harness.suspect(1, SuspicionReason.LINK)
    harness.pass_time(0.3, 0, 2, 3)
    (dead,) = [n for n in harness.news if isinstance(n, Verdict)]
    assert dead.first_signal_at == began_at
    assert began_at + TIMINGS.window_s <= dead.decided_at <= began_at + TIMINGS.window_s + 0.03
    assert [s.reason for s in dead.signals] == [SuspicionReason.EXCHANGE, SuspicionReason.LINK]
