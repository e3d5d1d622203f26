"""The pages are true where a program can tell: references are those of the code, and files that a
page names are there."""

from __future__ import annotations

import pytest

from docs import check, generate

TRACKED = ["gateway/metrics.py", "docs/index.md"]


def problems(text: str) -> list[str]:
    return list(check.check_page("README.md", text, TRACKED))


def test_every_reference_is_current() -> None:
    stale = [
        name
        for name, text in generate.pages().items()
        if generate.read(generate.REFERENCE / name) != text
    ]
    assert not stale, "run: python -m docs.generate"


def test_every_page_is_well_formed() -> None:
    assert check.check_all() == []


def test_every_service_and_option_is_in_the_reference() -> None:
    text = generate.configuration_page()
    for section in ("gateway", "control_plane", "agent", "rank"):
        assert f"\n## {section}\n" in text
    assert "| `exchange_deadline_ms` | float | `40.0` |" in text


def test_an_event_with_a_level_chosen_at_run_time_is_in_the_reference() -> None:
    assert "| `link_broken` | info or debug |" in generate.log_events_page()


@pytest.mark.parametrize("path", ["gateway/metrics.py", "metrics.py", "gateway/", "README"])
def test_a_path_that_is_there_is_no_problem(path: str) -> None:
    assert problems(f"see `{path}`") == []


@pytest.mark.parametrize("path", ["gateway/gone.py", "etrics.py", "gone/", "gateway/gone/"])
def test_a_path_that_is_gone_is_a_problem(path: str) -> None:
    assert problems(f"see `{path}`") == [f"README.md:1: there is no {path}"]


def test_prose_is_at_most_100_columns_wide_and_tables_and_code_may_be_wider() -> None:
    assert problems("x" * 100) == []
    assert len(problems("x" * 101)) == 1
    assert problems("| " + "x" * 101) == []
    assert problems("```\n" + "x" * 101 + "\n```") == []


def test_a_link_leads_to_a_page_and_to_a_heading_of_it() -> None:
    assert problems("[a](docs/gpu.md#the-exchange-between-ranks) [b](https://example.org)") == []
    assert len(problems("[a](docs/gone.md)")) == 1
    assert len(problems("[a](docs/gpu.md#gone)")) == 1


def test_the_index_lists_every_page() -> None:
    tracked = ["docs/index.md", "docs/gpu.md", "docs/reference/metrics.md", "models/README.md"]
    assert list(check.unlisted_pages("[a](gpu.md)", tracked)) == [
        "docs/index.md: does not list docs/reference/metrics.md"
    ]
    assert not list(check.unlisted_pages("[a](gpu.md#x) [b](reference/metrics.md)", tracked))
