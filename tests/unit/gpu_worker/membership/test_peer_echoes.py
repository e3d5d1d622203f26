"""Which peers have not answered, and for how long."""

from __future__ import annotations

from gpu_worker.membership.peer_echoes import OWN_PAUSE_S, PATIENCE_MAX_S, PeerEchoes
from shared.types import Incarnation, Member, RankId


def member(rank: int) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(1))


def unheard(echoes: PeerEchoes, now: float) -> dict[int, float]:
    return {peer.rank: round(peer.for_ms) for peer in echoes.unheard(now)}


def test_a_peer_is_asked_again_at_each_look_until_it_answers() -> None:
    echoes = PeerEchoes(0.0)
    assert echoes.ask([member(1), member(2)], 10.0) == [member(1), member(2)]
    assert echoes.ask([member(1)], 10.02) == []
    assert echoes.on_look(10.02) == [member(1), member(2)]
    assert unheard(echoes, 10.2) == {1: 200, 2: 200}
    echoes.on_answer(member(1), 10.001)
    assert echoes.on_look(10.04) == [member(2)]
    assert unheard(echoes, 10.3) == {2: 297}
    assert echoes.ask([member(1)], 10.3) == [member(1)]
    echoes.on_answer(member(1), 10.3)
    assert echoes.is_waiting
    echoes.forget(member(2))
    assert not echoes.is_waiting


def test_an_answer_that_nobody_asked_for_changes_nothing() -> None:
    echoes = PeerEchoes(0.0)
    echoes.on_answer(member(1), 1.0)
    assert not echoes.is_waiting


def test_time_in_which_this_process_did_not_run_does_not_count() -> None:
    echoes = PeerEchoes(0.0)
    echoes.ask([member(1)], 10.0)
    echoes.on_look(10.0 + OWN_PAUSE_S / 2)
    echoes.on_look(12.0 + OWN_PAUSE_S / 2)
    assert unheard(echoes, 12.1) == {1: 100}


def test_a_look_long_ago_is_no_pause() -> None:
    echoes = PeerEchoes(0.0)
    echoes.ask([member(1)], 10.0)
    echoes.on_answer(member(1), 10.0)
    echoes.ask([member(1)], 20.0)
    echoes.on_look(20.05)
    assert unheard(echoes, 20.1) == {1: 100}


def test_a_slow_way_is_no_cut() -> None:
    """Answers come after a tenth of a second, as over 50 ms each way."""
    echoes = PeerEchoes(0.0)
    echoes.ask([member(1)], 10.0)
    echoes.on_answer(member(1), 10.05)
    echoes.ask([member(1)], 11.0)
    assert unheard(echoes, 11.1) == {1: 0}
    assert unheard(echoes, 11.2) == {1: 50}


def test_after_a_long_pause_not_all_time_is_granted() -> None:
    echoes = PeerEchoes(0.0)
    echoes.ask([member(1)], 10.0)
    echoes.on_answer(member(1), 11.0)
    echoes.ask([member(1)], 12.0)
    assert unheard(echoes, 12.5) == {1: 1000 * (0.5 - PATIENCE_MAX_S)}
