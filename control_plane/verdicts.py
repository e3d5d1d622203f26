"""A death as the detector judged it, and the verdict that says so in etcd: one as the other."""

from __future__ import annotations

from control_plane.cluster_view import member_of
from control_plane.judgements import Dead
from shared.records import Verdict
from shared.types import Epoch


def verdict_of(dead: Dead, epoch: Epoch) -> Verdict:
    """`epoch`: of the map that leaves the life out."""
    return Verdict(
        rank=dead.member.rank,
        incarnation=dead.member.incarnation,
        cause=dead.cause,
        signals=dead.signals,
        epoch=epoch,
        first_signal_at=dead.first_signal_at,
        decided_at=dead.decided_at,
    )


def dead_of(verdict: Verdict) -> Dead:
    return Dead(
        member=member_of(verdict),
        cause=verdict.cause,
        signals=verdict.signals,
        first_signal_at=verdict.first_signal_at,
        decided_at=verdict.decided_at,
    )
