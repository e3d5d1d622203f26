"""What --ranks accepts."""

from __future__ import annotations

import pytest

from node_agent.rank_list import parse_ranks
from shared.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("0-3", (0, 1, 2, 3)), ("5", (5,)), ("4,0-1, 0", (0, 1, 4)), ("2-2", (2,)), ("", ())],
)
def test_lists_and_ranges(text: str, ranks: tuple[int, ...]) -> None:
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "1-", "0,,1", "0-1-2"])
def test_nonsense_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="--ranks"):
        parse_ranks(text)
