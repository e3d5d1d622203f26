"""The share of right drafts in a measurement."""

from __future__ import annotations

from cli.bench.drafts import Drafts


def test_only_what_the_measurement_added_counts() -> None:
    assert Drafts(150, 90).since(Drafts(50, 10)) == 0.8
    assert Drafts(50, 10).since(Drafts()) == 0.2


def test_without_drafts_there_is_no_share() -> None:
    assert Drafts().since(Drafts()) is None
    assert Drafts(50, 10).since(Drafts(50, 10)) is None
    assert Drafts(3, 1).since(Drafts(50, 10)) is None  # ranks began anew meanwhile
