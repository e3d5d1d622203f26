"""Thousands of random schedules, and proof that they would notice: bugs planted on purpose must
fall.

STARFISH_SIM_SCHEDULES sets how many are run; a failing seed is run alone by
`python -m tests.sim.replay SEED`.
"""

from __future__ import annotations

import os

import pytest

from gpu_worker.cuda.runner import CudaRunner, physical_slots
from gpu_worker.engine import sequence
from gpu_worker.exchange.graph_barrier import GraphBarrier
from gpu_worker.exchange.wait_policy import WaitPolicy
from gpu_worker.kv_replication.replica_ledger import ReplicaLedger
from gpu_worker.membership.rank_membership import RankMembership
from node_agent.rank_supervisor import RankSupervisor
from tests.sim.many_schedules import ManyOutcomes, outcome_of
from tests.sim.planted import is_noticed
from tests.sim.schedules import (
    CARD_FIRST_SEED,
    run_control_plane_outage,
    run_schedule,
)
from tests.support import local_exchange as local

NUM_SCHEDULES = int(os.environ.get("STARFISH_SIM_SCHEDULES", "48"))
FIRST_SEED = int(os.environ.get("STARFISH_SIM_FIRST_SEED", "0"))

REGRESSION_SEEDS = {
    67: "ranks of a large instance, all judged by their leases after an outage of etcd",
    136: "after an outage of etcd all were judged by their leases, and never learnt it",
    143: "the same, and the dead that no map could leave out blocked every joiner",
    182: "leases expired one by one, just before their owners could have renewed them",
    244: "a second death while a slot of the map was being loaded with an orphan of the first",
    299: "a death in an outage of etcd, found by a leader that could ask nobody",
    597: "a map that names what a load for an assignment since replaced was overwriting",
    100476: "a leader that heard nobody took their last words for a step that stands still",
    203496: "a pair of ranks had its link again, and one was given up as it came to the epoch",
    206149: "a verdict after a standstill did not say upon what it rested",
    **dict.fromkeys(
        (207666, 208402, 210526, 211478),
        "the checker took a verdict's second writing, with its map's epoch, for another death",
    ),
}


NUM_CARD_SCHEDULES = NUM_SCHEDULES // 2
PART = 12
"""Schedules of one test: tests are what processes share among them."""
TIMEOUT_S = int(os.environ.get("STARFISH_SIM_TIMEOUT_S", "1800"))

CARD_REGRESSION_SEEDS = {
    21: "an ordinary one, in which the planted bugs below are noticed",
    66: "survivors refused the successor of a member that had been given up",
    225: "the same, of a member that had died before it could be mapped",
    251: "an assignment and a held map took turns at one slot: it was loaded again and again",
    8: "a load held Python's lock for 0.4 s, and a verdict ended the rank",
    5: "launch counts differed after graph timeouts: a graph took a message of a former graph",
    12: "a member left, because a map named it as a joiner that nobody had yet heard of",
    168: "the same as 5, and a client got other tokens",
    357: "no step moved, and of ranks that all waited for all the last was declared dead",
    312: "all ranks were stopped at once, on a host each, and one was declared dead",
    164: "a rank whose own context was gone lived on, linked to nobody, and no map formed again",
    820050: "a release that ended after its incarnation began a load in what had ended",
    10: "mapping a joiner took 0.3 to 1 s, and a verdict ended the rank that maps",
    206535: "the last member was stopped for 0.4 s, and a verdict ended it",
    204209: "the checker took a verdict's second writing, with its map's epoch, for another death",
    204624: "the same",
    730129: "a gateway took what others had stepped before it asked for steps without the rank",
    **dict.fromkeys((920002, 920290), "the same: sessions moved from a rank that paused"),
    # Connections begin with a handshake now: the schedule is another one, so it may not be mended.
    438: "all ranks die one after another while maps follow each other, and no map forms again",
}
"""Counted from CARD_FIRST_SEED."""


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, PART))
def test_no_schedule_breaks_an_invariant(first: int) -> None:
    check_schedules(range(first, min(first + PART, NUM_SCHEDULES)), FIRST_SEED)


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("first", range(0, NUM_CARD_SCHEDULES, PART))
def test_no_schedule_on_cards_breaks_an_invariant(first: int) -> None:
    seeds = range(first, min(first + PART, NUM_CARD_SCHEDULES))
    check_schedules(seeds, CARD_FIRST_SEED + FIRST_SEED)


def check_schedules(seeds: range, first_seed: int) -> None:
    found = ManyOutcomes()
    for seed in seeds:
        found.add(outcome_of(first_seed + seed))
    assert not found.broken, "\n".join(found.broken)
    assert found.moves, "the faults should have moved sessions"
    assert found.restored > len(seeds) // 4, "sessions should have found copies of their blocks"


def test_a_seed_is_one_schedule() -> None:
    assert run_schedule(11) == run_schedule(11)


@pytest.mark.parametrize("seed", REGRESSION_SEEDS)
def test_a_schedule_that_once_failed_passes(seed: int) -> None:
    run_schedule(seed)


@pytest.mark.parametrize("seed", CARD_REGRESSION_SEEDS)
def test_a_schedule_on_cards_that_once_failed_passes(seed: int) -> None:
    run_schedule(CARD_FIRST_SEED + seed)


@pytest.mark.parametrize("seed", range(6))
def test_sessions_finish_while_etcd_and_the_control_planes_are_away(seed: int) -> None:
    run_control_plane_outage(seed)


def is_noticed_on_cards(*likely: int) -> bool:
    return is_noticed(*likely, run=lambda seed: run_schedule(CARD_FIRST_SEED + seed))


def test_a_step_that_goes_on_without_its_peers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2. A wait that is given up at the deadline sums what is there."""

    take = local.LocalHub.take

    def take_or_skip_dead(self, source, target, place):  # type: ignore[no-untyped-def]
        message = take(self, source, target, place)
        process = self._process_of[source]
        if message is None and process.dead:
            none = local.np.empty(0, dtype=local.np.int32)
            rows_NH = local.np.zeros((0, self.hidden_size), dtype=local.np.float32)
            return local._Message(rows_NH=rows_NH, pair_rows=none, pair_slots=none)
        return message

    monkeypatch.setattr(local.LocalHub, "take", take_or_skip_dead)
    assert is_noticed(3, 2)


def test_a_continuation_that_forgets_what_was_emitted_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 1. A rank that starts over from the prompt."""
    init = sequence.Sequence.__init__

    def forget(self, submit, **more):  # type: ignore[no-untyped-def]
        init(self, submit, **more)
        if submit.num_emitted:
            del self.tokens[-1]
            self.num_given -= 1

    monkeypatch.setattr(sequence.Sequence, "__init__", forget)
    assert is_noticed(5, 2)


def test_wrong_drafts_that_count_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 1. Nobody looks whether a draft was right."""
    monkeypatch.setattr(
        "gpu_worker.engine.scheduler.counted_rows", lambda plan, ids: [True] * len(ids)
    )
    assert is_noticed(7)


def test_a_kv_replica_overwritten_while_known_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 1. A source that takes slots for other blocks without asking."""

    def take_unasked(self):  # type: ignore[no-untyped-def]
        self.note_dropped(pick_drops(self))
        return []

    pick_drops = ReplicaLedger.pick_drops
    monkeypatch.setattr(ReplicaLedger, "pick_drops", take_unasked)
    assert is_noticed(5, 11)


def test_a_wait_that_no_epoch_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 9. Survivors that wait for the dead for ever."""
    monkeypatch.setattr(WaitPolicy, "check_epoch", lambda self: None)
    assert is_noticed(3, 2)


def test_a_graph_that_lacks_a_member_and_counts_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 2, on cards. Nobody looks at the mask that a graph has left."""
    monkeypatch.setattr("gpu_worker.cuda.ep.rank_mask.RankMask.check_step", lambda *_: None)
    assert is_noticed_on_cards(21)


def test_survivors_that_refuse_a_successor_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 9, on cards. As long as their adopted map names the dead."""

    def may_map(self, rank):  # type: ignore[no-untyped-def]
        if any(m.rank == rank for m in self.members):
            raise ConnectionError("a member")
        return not self.epoch or rank not in self._mapped

    monkeypatch.setattr("gpu_worker.cuda.ep.members.EpMembers.may_map", may_map)
    assert is_noticed_on_cards(66)


def test_a_graph_that_ends_unseen_without_a_member_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 2, on cards. Nobody looks at the mask of a graph whose step was abandoned."""
    done = GraphBarrier.on_graph_done
    monkeypatch.setattr(GraphBarrier, "on_graph_done", lambda self, lost=(): done(self))
    assert is_noticed_on_cards(70, 5)


def test_a_resync_that_wipes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 2, on cards. What peers have sent before it is taken for what they send after."""
    adopt = CudaRunner.adopt

    def adopt_as_if_new(self, expert_map):  # type: ignore[no-untyped-def]
        self._has_met_others = False
        return adopt(self, expert_map)

    monkeypatch.setattr(CudaRunner, "adopt", adopt_as_if_new)
    monkeypatch.setattr(GraphBarrier, "may_flush", lambda self, *, stopped: False)
    assert is_noticed_on_cards(14, 9, 29)


def test_steps_that_skip_experts_and_count_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 1, on cards. Whoever dies, also one that no running step waits for."""
    monkeypatch.setattr("gpu_worker.cuda.ep.members.EpMembers.delivers_no_more", lambda self: True)
    assert is_noticed_on_cards(21, 19, 5)


def test_a_table_of_slots_that_a_verdict_clears_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Invariant 1, on cards. The table is written before the mask knows of its map."""
    adopt = CudaRunner.adopt

    def write_first(self, expert_map):  # type: ignore[no-untyped-def]
        write, map_members = self._decoder.use_slots, self._mask.map_members

        def write_and_map(_):  # type: ignore[no-untyped-def]
            write(physical_slots(expert_map, self._member.rank, self._replicas))
            return map_members(expert_map)

        with monkeypatch.context() as planted:
            planted.setattr(self._decoder, "use_slots", lambda _: None)
            planted.setattr(self._mask, "map_members", write_and_map)
            return adopt(self, expert_map)

    monkeypatch.setattr(CudaRunner, "adopt", write_first)
    assert is_noticed_on_cards(21, 19, 5)


def test_a_fenced_rank_that_stays_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 6. One that was declared dead must leave, or be made to, or its rank never comes
    back."""
    monkeypatch.setattr(RankSupervisor, "on_declared_dead", lambda self, member, now: [])
    monkeypatch.setattr(RankMembership, "on_map", _ignore_exclusion(RankMembership.on_map))
    monkeypatch.setattr(RankMembership, "on_verdict", lambda *_, is_drained: [])
    assert is_noticed(21, 14)


def _ignore_exclusion(on_map):  # type: ignore[no-untyped-def]
    def ignoring(self, expert_map):  # type: ignore[no-untyped-def]
        if self._was_member and not expert_map.has(self.record.member):
            return []
        return on_map(self, expert_map)

    return ignoring
