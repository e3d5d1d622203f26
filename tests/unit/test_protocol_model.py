"""The protocol's model: under each kind of fault no reachable state breaks an invariant, and with a
rule broken one does."""

from __future__ import annotations

import pytest

from docs.protocol.explorations import EXPLORATIONS, Exploration
from docs.protocol.explore import explore

SHORT = [each for each in EXPLORATIONS if not each.is_long]


@pytest.mark.parametrize("exploration", SHORT, ids=lambda each: each.name.replace(" ", "-"))
def test_explored_states(exploration: Exploration) -> None:
    found = explore(exploration.rules, exploration.budget)
    assert found.problem.startswith(exploration.problem), found.trace
    if not exploration.problem:
        assert not found.problem, found.trace
        assert found.is_whole
