"""Adoptions: the times of a recovery, as the rank lived it."""

from __future__ import annotations

from gpu_worker.engine.adoption_log import KEPT_MAX, AdoptionLog
from shared.types import Epoch
from shared.wire import Adoption


def test_the_first_commit_after_an_adoption_is_its_replay() -> None:
    log = AdoptionLog()
    log.record_adoption(Epoch(3), seen_at=1.0, now=2.0, abandoned=True)
    log.record_commit(now=3.0, num_reprefilled=5)
    log.record_commit(now=4.0, num_reprefilled=0)
    log.record_commit(now=5.0, num_reprefilled=7)
    assert log.entries == (
        Adoption(
            epoch=Epoch(3),
            seen_at=1.0,
            adopted_at=2.0,
            replayed_at=3.0,
            abandoned=True,
            reprefill_tokens=12,
        ),
    )


def test_the_next_epoch_takes_over_the_counting() -> None:
    log = AdoptionLog()
    for epoch in (1, 2):
        log.record_adoption(Epoch(epoch), seen_at=0.0, now=0.0, abandoned=False)
        log.record_commit(now=1.0, num_reprefilled=epoch)
    assert [entry.reprefill_tokens for entry in log.entries] == [1, 2]


def test_an_epoch_passed_over_before_its_first_commit_was_never_replayed() -> None:
    log = AdoptionLog()
    log.record_adoption(Epoch(1), seen_at=0.0, now=0.0, abandoned=False)
    log.record_adoption(Epoch(2), seen_at=0.0, now=0.0, abandoned=True)
    log.record_commit(now=9.0, num_reprefilled=0)
    assert [entry.replayed_at for entry in log.entries] == [0.0, 9.0]


def test_only_the_last_are_kept_oldest_first() -> None:
    log = AdoptionLog()
    for epoch in range(1, KEPT_MAX + 5):
        log.record_adoption(Epoch(epoch), seen_at=0.0, now=0.0, abandoned=False)
    assert [entry.epoch for entry in log.entries] == list(range(5, KEPT_MAX + 5))
