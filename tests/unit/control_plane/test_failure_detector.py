"""The failure detector: every signal in every state, and the guards against false verdicts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from control_plane.detector_timings import DetectorTimings
from control_plane.failure_detector import OWN_NAME, FailureDetector
from control_plane.judgements import Alarm, AlarmKind, Judgement, Standstill
from control_plane.silence import SilenceTimings
from shared.records import ProcessView, Suspicion, Verdict
from shared.types import (
    ACCUSERS,
    Accuser,
    Epoch,
    Incarnation,
    Member,
    NodeId,
    Operation,
    ProcessState,
    RankId,
    Step,
    SuspicionReason,
)
from shared.wire import AnnouncedOperation, Load, Pong, UnheardPeer

WINDOW_S = 0.25
TIMINGS = DetectorTimings(silence=SilenceTimings(override_s=WINDOW_S))
"""Of the tests of signals: one window for all kinds of silence."""
NODE = NodeId("host")
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

    def __init__(
        self, count: int = 4, timings: DetectorTimings = TIMINGS, node: NodeId | None = None
    ) -> None:
        """On a host each, or all on `node`."""
        self.now = 100.0
        self.detector = FailureDetector(timings, self.now)
        self.news: list[Judgement] = []
        self.members = [member(rank) for rank in range(count)]
        self.step = 1
        for one in self.members:
            self.take(self.detector.on_record(one, node or NodeId(f"host-{one.rank}"), self.now))
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
        epoch: int = 1,
        step: int | None = None,
        loads_for_ms: float = 0.0,
        unheard: dict[int, float] | None = None,
    ) -> None:
        """`loads_for_ms`: it announces a load that ends so much later at the latest. `unheard`:
        ranks that it asked so many ms ago, without an answer."""
        load = AnnouncedOperation(operation=Operation.LOAD, at_most_ms=loads_for_ms)
        pong = Pong(
            nonce=1,
            rank=RankId(rank),
            incarnation=Incarnation(1),
            epoch=Epoch(epoch),
            step=Step(self.step if step is None else step),
            engine_age_ms=engine_age_ms,
            waiting_for=tuple(RankId(r) for r in waiting_for),
            load=LOAD,
            announced=(load,) if loads_for_ms else (),
            unheard=tuple(
                UnheardPeer(rank=RankId(r), for_ms=ms) for r, ms in (unheard or {}).items()
            ),
        )
        self.take(self.detector.on_pong(member(rank), pong, self.now))

    def suspect(self, rank: int, reason: SuspicionReason = SuspicionReason.EXCHANGE) -> None:
        self.take(self.detector.on_suspicion(suspicion(rank, reason), self.now))

    def view(self, rank: int, state: ProcessState, host_gap_ms: float = 0.0) -> None:
        view = ProcessView(
            rank=RankId(rank),
            incarnation=Incarnation(1),
            state=state,
            host_gap_ms=host_gap_ms,
        )
        self.take(self.detector.on_view(view, self.now))

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
        harness.pass_time(WINDOW_S - 0.02, 0, 2, 3)
        assert harness.dead == {}
        harness.pass_time(0.04, 0, 2, 3)
    assert harness.dead == {1: reason}


LEARNT = DetectorTimings()
STOPPED_S = LEARNT.silence.stopped_s
UNSEEN_S = LEARNT.silence.unseen_s
HOST_PAUSE_S = LEARNT.silence.host_pause_s
HUNG_S = LEARNT.silence.hung_s


@pytest.fixture
def one_host() -> DetectorHarness:
    """Four members on one host; patience is learnt."""
    return DetectorHarness(timings=LEARNT, node=NODE)


def test_a_process_that_its_node_agent_saw_stopped_is_dead_soon(one_host: DetectorHarness) -> None:
    one_host.view(1, ProcessState.STOPPED)
    one_host.pass_time(STOPPED_S - 0.02, 0, 2, 3)
    assert one_host.dead == {}
    one_host.pass_time(0.04, 0, 2, 3)
    assert one_host.dead == {1: SuspicionReason.STOPPED}


def test_a_stopped_process_that_goes_on_in_time_lives(one_host: DetectorHarness) -> None:
    one_host.view(1, ProcessState.STOPPED)
    one_host.pass_time(STOPPED_S - 0.02, 0, 2, 3)
    one_host.view(1, ProcessState.RUNNING)
    one_host.pass_time(1.0, 0, 1, 2, 3)
    assert one_host.news == []


def test_a_stopped_process_that_answers_is_not_stopped_though_nobody_says_so(
    one_host: DetectorHarness,
) -> None:
    """Its node agent may be gone."""
    one_host.view(1, ProcessState.STOPPED)
    one_host.pass_time(STOPPED_S - 0.02, 0, 2, 3)
    one_host.pass_time(2.0, 0, 1, 2, 3)
    one_host.suspect(1)
    one_host.pass_time(2 * STOPPED_S, 0, 2, 3)
    assert one_host.dead == {}


def test_an_answer_that_was_under_way_when_the_process_stopped_proves_nothing(
    one_host: DetectorHarness,
) -> None:
    one_host.view(1, ProcessState.STOPPED)
    one_host.pass_time(0.02, 0, 1, 2, 3)
    one_host.pass_time(STOPPED_S + 0.03, 0, 2, 3)
    assert one_host.dead == {1: SuspicionReason.STOPPED}


def test_what_a_node_agent_said_before_this_term_only_makes_a_suspect(
    one_host: DetectorHarness,
) -> None:
    view = ProcessView(rank=RankId(1), incarnation=Incarnation(1), state=ProcessState.STOPPED)
    one_host.take(one_host.detector.on_view(view, one_host.now, is_news=False))
    assert one_host.detector.suspected == (member(1),)
    one_host.pass_time(3 * STOPPED_S, 0, 2, 3)
    assert one_host.dead == {}
    one_host.view(1, ProcessState.STOPPED)
    one_host.pass_time(STOPPED_S + 0.02, 0, 2, 3)
    assert one_host.dead == {1: SuspicionReason.STOPPED}


def test_a_host_whose_processes_are_all_stopped_for_a_second_loses_none(
    one_host: DetectorHarness,
) -> None:
    for rank in range(4):
        one_host.view(rank, ProcessState.STOPPED)
    one_host.pass_time(1.0)
    for rank in range(4):
        one_host.view(rank, ProcessState.RUNNING)
    one_host.pass_time(1.0, 0, 1, 2, 3)
    assert one_host.dead == {}


def test_a_host_whose_processes_stay_stopped_is_lost(one_host: DetectorHarness) -> None:
    for rank in range(4):
        one_host.view(rank, ProcessState.STOPPED)
    one_host.pass_time(HOST_PAUSE_S + STOPPED_S + 0.1)
    assert set(one_host.dead) == {0, 1, 2, 3}


def test_half_of_a_host_stopped_is_no_paused_host(one_host: DetectorHarness) -> None:
    for rank in (1, 2):
        one_host.view(rank, ProcessState.STOPPED)
    one_host.pass_time(STOPPED_S + 0.02, 0, 3)
    assert set(one_host.dead) == {1, 2}


def test_a_host_of_several_that_falls_silent_for_a_second_loses_none() -> None:
    """As when a virtual machine is paused: nothing of it says anything, its node agent neither."""
    harness = DetectorHarness(count=8, timings=LEARNT, node=NODE)
    for rank in range(4, 8):
        harness.take(harness.detector.on_record(member(rank), NodeId("other"), harness.now))
    for rank in range(3):
        harness.suspect(rank)
    harness.pass_time(1.0, 3, 4, 5, 6, 7)
    assert harness.dead == {}
    harness.pass_time(1.0, 0, 1, 2, 3, 4, 5, 6, 7)
    assert harness.dead == {}


@pytest.mark.parametrize(
    "state", [ProcessState.RUNNING, ProcessState.STARVED, ProcessState.SLEEPING]
)
def test_a_process_that_its_kernel_knows_to_live_has_time(
    one_host: DetectorHarness, state: ProcessState
) -> None:
    one_host.suspect(1)
    for _ in range(round(HUNG_S / 0.1) - 1):
        one_host.view(1, state)
        one_host.pass_time(0.1, 0, 2, 3)
    assert one_host.dead == {}
    one_host.view(1, state)
    one_host.pass_time(0.2, 0, 2, 3)
    assert one_host.dead == {1: SuspicionReason.EXCHANGE}


def test_a_member_of_which_nobody_says_anything_is_dead_after_more_than_a_second(
    one_host: DetectorHarness,
) -> None:
    one_host.suspect(1)
    one_host.pass_time(UNSEEN_S - 0.05, 0, 2, 3)
    assert one_host.dead == {}
    one_host.pass_time(0.1, 0, 2, 3)
    assert one_host.dead == {1: SuspicionReason.EXCHANGE}


def test_what_a_node_agent_said_long_ago_does_not_count(one_host: DetectorHarness) -> None:
    one_host.view(1, ProcessState.RUNNING)
    one_host.pass_time(1.0, 0, 1, 2, 3)
    one_host.suspect(1)
    one_host.pass_time(UNSEEN_S + 0.05, 0, 2, 3)
    assert one_host.dead == {1: SuspicionReason.EXCHANGE}


def test_a_node_agent_that_did_not_run_itself_says_that_its_host_was_paused(
    one_host: DetectorHarness,
) -> None:
    one_host.view(1, ProcessState.STOPPED, host_gap_ms=300.0)
    one_host.pass_time(1.0, 0, 2, 3)
    assert one_host.dead == {}


def test_an_exit_is_a_death_at_once_though_its_host_is_paused(one_host: DetectorHarness) -> None:
    one_host.view(1, ProcessState.RUNNING, host_gap_ms=300.0)
    one_host.suspect(1, SuspicionReason.EXIT)
    assert one_host.dead == {1: SuspicionReason.EXIT}


def test_slow_answers_of_an_instance_make_silence_mean_less() -> None:
    harness = DetectorHarness(timings=LEARNT)
    harness.pass_time(1.0, 0, 1, 2, 3, engine_age_ms=700.0)
    harness.suspect(1)
    harness.pass_time(UNSEEN_S + 0.1, 0, 2, 3)
    assert harness.dead == {}


def test_each_suspected_member_is_one_doubt_that_is_no_signal_itself(
    one_host: DetectorHarness,
) -> None:
    assert one_host.detector.doubts == ()
    one_host.suspect(1)
    (doubt,) = one_host.detector.doubts
    assert doubt.member == member(1)
    one_host.take(one_host.detector.on_probe_broken(member(1), one_host.now))
    before = dict(one_host.dead)
    harness = DetectorHarness(timings=LEARNT, node=NODE)
    harness.take(harness.detector.on_probe_broken(member(1), harness.now))
    harness.take(harness.detector.on_suspicion(doubt, harness.now))
    assert before == {1: SuspicionReason.EXCHANGE}
    assert harness.dead == {}


def test_a_stuck_engine_is_silence_though_the_event_loop_answers(harness: DetectorHarness) -> None:
    harness.suspect(1)
    for _ in range(30):
        harness.pong(1, engine_age_ms=(harness.now - 99.0) * 1000)
        harness.pass_time(0.01, 0, 2, 3)
    assert harness.dead == {1: SuspicionReason.EXCHANGE}


ANNOUNCED_MAX_S = TIMINGS.silence.announced_max_s


def test_what_a_member_announced_excuses_its_silence_until_it_should_be_over(
    harness: DetectorHarness,
) -> None:
    harness.pong(1, loads_for_ms=1000.0)
    harness.suspect(1)
    harness.pass_time(0.95, 0, 2, 3)
    assert harness.dead == {}
    harness.pass_time(0.1, 0, 2, 3)
    assert harness.dead == {1: SuspicionReason.EXCHANGE}


def test_what_is_over_before_it_had_to_be_excuses_nothing(harness: DetectorHarness) -> None:
    harness.pong(1, loads_for_ms=1000.0)
    harness.pong(1)
    harness.suspect(1)
    harness.pass_time(WINDOW_S + 0.02, 0, 2, 3)
    assert harness.dead == {1: SuspicionReason.EXCHANGE}


def test_no_announcement_excuses_for_longer_than_the_longest(harness: DetectorHarness) -> None:
    harness.pong(1, loads_for_ms=1e9)
    harness.suspect(1)
    harness.pass_time(ANNOUNCED_MAX_S - 0.05, 0, 2, 3)
    assert harness.dead == {}
    harness.pass_time(0.1, 0, 2, 3)
    assert harness.dead == {1: SuspicionReason.EXCHANGE}


def test_a_stuck_engine_that_announces_again_and_again_is_dead(harness: DetectorHarness) -> None:
    began = harness.now
    harness.suspect(1)
    for _ in range(round(ANNOUNCED_MAX_S / 0.1) + 1):
        harness.pong(1, engine_age_ms=(harness.now - began) * 1000 + 1, loads_for_ms=2000.0)
        harness.pass_time(0.1, 0, 2, 3)
    assert harness.dead == {1: SuspicionReason.EXCHANGE}


def _exit(harness: DetectorHarness) -> None:
    harness.suspect(1, SuspicionReason.EXIT)


def _refuse(harness: DetectorHarness) -> None:
    harness.take(harness.detector.on_probe_refused(member(1), harness.now))


def _succeed(harness: DetectorHarness) -> None:
    harness.take(harness.detector.on_record(member(1, 2), NODE, harness.now))


def _break_twice(harness: DetectorHarness) -> None:
    harness.suspect(1)
    harness.take(harness.detector.on_probe_broken(member(1), harness.now))


def _lose_lease_and_break(harness: DetectorHarness) -> None:
    harness.lose_lease(1)
    harness.take(harness.detector.on_probe_broken(member(1), harness.now))


@pytest.mark.parametrize("die", [_exit, _refuse, _succeed, _break_twice, _lose_lease_and_break])
def test_proof_of_a_death_outranks_what_was_announced(
    harness: DetectorHarness, die: Callable[[DetectorHarness], None]
) -> None:
    harness.pong(1, loads_for_ms=2000.0)
    die(harness)
    assert set(harness.dead) == {1}


def test_a_stop_outranks_what_was_announced(one_host: DetectorHarness) -> None:
    one_host.pong(1, loads_for_ms=2000.0)
    one_host.view(1, ProcessState.STOPPED)
    one_host.pass_time(STOPPED_S + 0.02, 0, 2, 3)
    assert one_host.dead == {1: SuspicionReason.STOPPED}


def test_a_lease_lost_in_an_announced_operation_may_be_taken_again_after_it(
    harness: DetectorHarness,
) -> None:
    harness.pong(1, loads_for_ms=3000.0)
    harness.lose_lease(1)
    harness.pass_time(2.5, 0, 2, 3)
    assert harness.dead == {}
    harness.take(harness.detector.on_record(member(1), NodeId("host-1"), harness.now))
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.dead == {}


def test_an_announced_operation_is_no_standstill(harness: DetectorHarness) -> None:
    harness.suspect(1)
    for _ in range(round(3.0 / 0.1)):
        harness.pong(1, loads_for_ms=1000.0)
        for rank in (0, 2, 3):
            harness.pong(rank, waiting_for=(1,))
        harness.pass_time(0.1)
    assert harness.news == []


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
    harness.pass_time(TIMINGS.probe_silence_s + WINDOW_S + 0.5, 0, 2, 3, tick_s=0.02)
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
    harness.take(harness.detector.on_record(member(0), NODE, harness.now))
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
        harness.take(harness.detector.on_record(member(rank), NODE, harness.now))
    assert not harness.detector.frozen
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.dead == {}


def test_in_a_mass_expiry_the_last_to_register_is_not_punished(harness: DetectorHarness) -> None:
    harness.lose_lease(0, 1, 2)
    harness.pass_time(0.3, 0, 1, 2, 3)
    for rank in (0, 1):
        harness.take(harness.detector.on_record(member(rank), NODE, harness.now))
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
    harness.take(harness.detector.on_record(member(2, 2), NODE, harness.now))
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
        harness.take(harness.detector.on_record(member(rank), NODE, harness.now))
    harness.pass_time(2.0, 0, 1, 2, 3)
    assert harness.dead == {}
    assert harness.alarms == [AlarmKind.MASS_EXPIRY]
    assert not harness.detector.frozen


def test_after_a_mass_expiry_who_neither_registers_nor_answers_is_dead_in_the_end() -> None:
    harness = leader_after_an_outage_of_etcd()
    harness.take(harness.detector.on_record(member(0), NODE, harness.now))
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
        harness.view(rank, ProcessState.STOPPED)
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


def test_most_ranks_stopped_at_once_are_paused_with_their_hosts() -> None:
    """Each has a host of its own, so that no host shows it alone."""
    harness = DetectorHarness(4, LEARNT)
    for rank in range(4):
        harness.view(rank, ProcessState.STOPPED)
    harness.pass_time(1.0)
    for rank in (1, 2, 3):
        harness.view(rank, ProcessState.RUNNING)
    harness.pass_time(STOPPED_S - 0.02, 1, 2, 3)
    assert harness.dead == {}
    harness.pass_time(0.1, 1, 2, 3)
    assert harness.dead == {0: SuspicionReason.STOPPED}


def test_the_last_member_stopped_is_paused_with_its_host() -> None:
    """The others are dead: nobody can show that its host runs, and nobody waits for it."""
    harness = DetectorHarness(3, LEARNT)
    for rank in (0, 1):
        harness.suspect(rank, SuspicionReason.EXIT)
    harness.view(2, ProcessState.STOPPED)
    harness.pass_time(1.0)
    assert set(harness.dead) == {0, 1}
    harness.pass_time(LEARNT.silence.host_pause_s - 1.0 + 0.02)
    assert harness.dead[2] is SuspicionReason.STOPPED


def test_what_a_rank_was_silent_for_before_it_was_stopped_does_not_count() -> None:
    harness = DetectorHarness(4, LEARNT)
    harness.suspect(1)
    harness.pass_time(0.5, 0, 2, 3)
    harness.view(1, ProcessState.STOPPED)
    harness.pass_time(STOPPED_S - 0.02, 0, 2, 3)
    assert harness.dead == {}
    harness.pass_time(0.04, 0, 2, 3)
    assert list(harness.dead) == [1]


def test_two_ranks_that_cannot_reach_each_other_lose_the_more_waited_for(
    harness: DetectorHarness,
) -> None:
    waits = {0: (1,), 1: (2,), 2: (1,), 3: (1,)}
    stand_still(harness, waits)
    assert harness.news == [Standstill()]
    stand_still(harness, waits)
    assert harness.dead == {1: SuspicionReason.LINK}


def stand_still(harness: DetectorHarness, waits: dict[int, tuple[int, ...]]) -> None:
    """Until there is one more judgement."""
    num_judgements = len(harness.news)
    for _ in range(round(TIMINGS.stuck_s / 0.02) + 10):
        if len(harness.news) > num_judgements:
            return
        harness.now += 0.02
        for rank, waiting_for in waits.items():
            for accused in waiting_for:
                harness.suspect(accused)
            harness.pong(rank, waiting_for=waiting_for)
        harness.take(harness.detector.on_tick(harness.now))


WAIT_FOR_ALL = {rank: tuple(r for r in range(4) if r != rank) for rank in range(4)}


def test_nobody_dies_where_all_wait_for_all(harness: DetectorHarness) -> None:
    """Kernels do not say for whom they wait. Whoever has the highest number is no more to blame
    than others."""
    for _ in range(5):
        stand_still(harness, WAIT_FOR_ALL)
    assert harness.dead == {}
    assert sum(isinstance(each, Standstill) for each in harness.news) == 5
    assert sum(isinstance(each, Alarm) for each in harness.news) == 1


def test_each_standstill_is_first_met_by_beginning_together(harness: DetectorHarness) -> None:
    waits = {0: (1,), 1: (2,), 2: (1,), 3: (1,)}
    stand_still(harness, waits)
    harness.step += 1
    harness.pass_time(0.1, 0, 1, 2, 3)
    stand_still(harness, waits)
    assert harness.news == [Standstill(), Standstill()]
    assert harness.dead == {}


def wait_for(harness: DetectorHarness, accused: int, seconds: float, *late: int) -> None:
    """In epoch 2, to which `late` have not come yet."""
    for _ in range(round(seconds / 0.02)):
        harness.now += 0.02
        for rank in range(4):
            is_late = rank in late
            waits = () if is_late or rank == accused else (accused,)
            harness.pong(rank, epoch=1 if is_late else 2, waiting_for=waits)
        harness.take(harness.detector.on_tick(harness.now))


def test_a_member_that_comes_to_the_epoch_late_gives_the_step_its_time_anew(
    harness: DetectorHarness,
) -> None:
    """Ranks 0 and 2 were cut from each other: 0 has its link again, and 2 is about to."""
    stand_still(harness, {0: (2,), 1: (2,), 2: (0,), 3: (2,)})
    assert harness.news == [Standstill()]
    wait_for(harness, 2, 0.02, 0, 2)
    harness.suspect(2)
    wait_for(harness, 2, TIMINGS.stuck_s - 0.3, 0, 2)
    wait_for(harness, 2, TIMINGS.stuck_s - 0.1, 2)
    assert harness.dead == {}
    wait_for(harness, 2, 0.2, 2)
    assert harness.dead == {2: SuspicionReason.LINK}


def test_a_verdict_after_a_standstill_says_who_waits_and_for_how_long(
    harness: DetectorHarness,
) -> None:
    """Whoever answers the control plane is trusted by it: there is no other signal then."""
    stand_still(harness, {0: (2,), 1: (2,), 2: (0,), 3: (2,)})
    wait_for(harness, 2, 0.02)
    began_at = harness.now
    harness.suspect(2)
    wait_for(harness, 2, TIMINGS.stuck_s + 0.1)
    verdict = harness.news[-1]
    assert isinstance(verdict, Verdict)
    (signal,) = verdict.signals
    assert (signal.reason, signal.by) == (SuspicionReason.LINK, OWN_NAME)
    assert signal.detail == "no step completes for 2.5 s, and 0.1, 1.1, 3.1 wait for it"
    assert began_at <= verdict.first_signal_at <= began_at + 0.1


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
    assert began_at + WINDOW_S <= dead.decided_at <= began_at + WINDOW_S + 0.03
    assert [s.reason for s in dead.signals] == [SuspicionReason.EXCHANGE, SuspicionReason.LINK]


def test_a_verdict_by_a_successor_alone_says_so(harness: DetectorHarness) -> None:
    harness.take(harness.detector.on_record(member(1, 2), NodeId("host-1"), harness.now))
    (dead,) = [n for n in harness.news if isinstance(n, Verdict)]
    assert [(s.reason, s.detail) for s in dead.signals] == [
        (SuspicionReason.EXIT, "its successor registered")
    ]
    assert dead.first_signal_at == dead.decided_at == harness.now


@pytest.mark.parametrize("reason", [reason for reason in SuspicionReason if ACCUSERS[reason]])
def test_a_doubt_has_a_reason_that_a_control_plane_may_give(reason: SuspicionReason) -> None:
    """Whoever reads etcd drops every other one as forged."""
    harness = DetectorHarness()
    harness.suspect(1, reason)
    for doubt in harness.detector.doubts:
        assert Accuser.CONTROL_PLANE in ACCUSERS[doubt.reason]
    assert bool(harness.detector.doubts) is (reason is not SuspicionReason.EXIT)


# Members that do not hear each other.


def pass_cut_off(
    harness: DetectorHarness,
    seconds: float,
    pairs: tuple[tuple[int, int], ...],
    *,
    answering: tuple[int, ...] = (0, 1, 2, 3),
    began_s: float = 0.0,
) -> None:
    """Of each pair the first has asked the second for `began_s` and does not hear it."""
    for tick in range(round(seconds / 0.02)):
        harness.now += 0.02
        unheard_ms = 1000 * (began_s + 0.02 * tick)
        for rank in answering:
            unheard = {far: unheard_ms for near, far in pairs if near == rank}
            harness.pong(rank, unheard=unheard)
        harness.take(harness.detector.on_tick(harness.now))


def test_of_two_that_do_not_hear_each_other_one_is_dead(harness: DetectorHarness) -> None:
    pass_cut_off(harness, TIMINGS.cut_off_s, ((0, 2), (2, 0)))
    assert harness.dead == {}
    assert harness.detector.urgent
    pass_cut_off(harness, 0.06, ((0, 2), (2, 0)), began_s=TIMINGS.cut_off_s)
    assert harness.dead == {2: SuspicionReason.LINK}
    (verdict,) = harness.news
    assert isinstance(verdict, Verdict)
    assert "0.1" in verdict.signals[0].detail


@pytest.mark.parametrize("slow", [0, 2], ids=["who asks", "who is asked"])
def test_one_that_answers_slowly_has_longer(harness: DetectorHarness, slow: int) -> None:
    """It may not have run for as long as it was silent to us: so its peers do not hear it, too."""
    others = tuple(rank for rank in range(4) if rank != slow)
    for tick in range(round((TIMINGS.cut_off_slow_s - 0.02) / 0.02)):
        answering = (0, 1, 2, 3) if tick % 5 == 0 else others
        pass_cut_off(harness, 0.02, ((0, 2), (2, 0)), answering=answering, began_s=0.02 * tick)
    assert harness.dead == {}
    pass_cut_off(harness, 0.12, ((0, 2), (2, 0)), began_s=TIMINGS.cut_off_slow_s)
    assert harness.dead == {2: SuspicionReason.LINK}


def test_pauses_of_either_are_no_cut(harness: DetectorHarness) -> None:
    """The one that asks and the one that is asked pause in turn, each so shortly that its answers
    to us count as prompt; so the one does not hear the other for both times together."""
    pause_s = TIMINGS.prompt_gap_max_s
    for _ in range(5):
        pass_cut_off(harness, 0.02, ((0, 2),), began_s=2 * pause_s)
        harness.pass_time(0.1, 0, 1, 2, 3)
    assert harness.dead == {}


def test_one_way_is_enough(harness: DetectorHarness) -> None:
    pass_cut_off(harness, TIMINGS.cut_off_s + 0.1, ((0, 2),))
    assert harness.dead == {2: SuspicionReason.LINK}


def test_who_is_cut_off_from_most_is_dead(harness: DetectorHarness) -> None:
    pass_cut_off(harness, TIMINGS.cut_off_s + 0.1, ((0, 2), (0, 3), (1, 0)))
    assert harness.dead == {0: SuspicionReason.LINK}


def test_two_hosts_that_do_not_hear_each_other_lose_one(harness: DetectorHarness) -> None:
    pass_cut_off(harness, TIMINGS.cut_off_s + 0.1, ((0, 2), (0, 3), (1, 2), (1, 3)))
    assert set(harness.dead) in ({0, 1}, {2, 3})


def test_a_peer_that_we_do_not_hear_either_was_paused(harness: DetectorHarness) -> None:
    """Of a pause of a second its peers may tell in the moment in which it goes on."""
    pass_cut_off(harness, 1.0, ((0, 2), (1, 2)), answering=(0, 1, 3))
    pass_cut_off(harness, 0.1, ((0, 2), (1, 2)), began_s=1.0)
    assert harness.dead == {}
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.dead == {}
    assert not harness.detector.urgent


def test_an_asker_that_was_paused_itself_is_not_believed(harness: DetectorHarness) -> None:
    pass_cut_off(harness, 1.0, (), answering=(1, 2, 3))
    pass_cut_off(harness, 0.1, ((0, 2), (0, 1), (0, 3)), began_s=1.0)
    harness.pass_time(1.0, 0, 1, 2, 3)
    assert harness.dead == {}


def test_a_lost_packet_is_no_cut(harness: DetectorHarness) -> None:
    for _ in range(10):
        pass_cut_off(harness, TIMINGS.cut_off_s - 0.04, ((0, 2), (2, 0)))
        harness.pass_time(0.1, 0, 1, 2, 3)
    assert harness.dead == {}
