"""What an exit code says in words."""

from __future__ import annotations

import pytest

from shared.exit_codes import describe_exit


@pytest.mark.parametrize(
    ("code", "text"),
    [(None, "exited"), (0, "exited with code 0"), (75, "exited with code 75"), (-15, "SIGTERM")],
)
def test_an_exit_is_told_in_words(code: int | None, text: str) -> None:
    assert text in describe_exit(code)
