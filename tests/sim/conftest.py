"""Simulated services log nothing: their faults are wanted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from tests.sim.many_schedules import be_quiet


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    be_quiet()
    yield
    structlog.reset_defaults()
