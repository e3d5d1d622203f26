"""An elastic instance compared with a static one: medians over pairs, and the overhead."""

from __future__ import annotations

import pytest

from cli.bench.serve import ERRORS, TOKENS_PER_S, ServeRow, comparison_rows
from cli.bench.stats import Spread


def row(rate: float, ttft_ms: float, *, concurrency: int = 8, errors: int = 0) -> ServeRow:
    return ServeRow(
        concurrency=concurrency,
        tokens_per_s=rate,
        ttft_ms=Spread(count=1, p50=ttft_ms, p99=0.0, max=0.0),
        itl_ms=Spread(count=1, p50=rate / 100, p99=rate / 10, max=0.0),
        errors=errors,
    )


ELASTIC = [row(90, 30), row(1, 900, errors=2), row(95, 33), row(5, 6, concurrency=1)]
STATIC = [row(100, 30), row(200, 30), row(80, 1), row(4, 8, concurrency=1)]


def test_rows_are_medians_of_their_own_concurrency() -> None:
    found = {(r.concurrency, r.quantity): r for r in comparison_rows((1, 8), ELASTIC, STATIC)}
    rate = found[8, TOKENS_PER_S]
    assert (rate.elastic, rate.static) == (90, 100)
    ttft = found[8, "TTFT p50 ms"]
    assert (ttft.elastic, ttft.static) == (33, 30)
    assert found[8, "between tokens p99 ms"].static == 10
    assert (found[1, TOKENS_PER_S].elastic, found[1, TOKENS_PER_S].static) == (5, 4)


def test_an_overhead_is_positive_where_elasticity_costs() -> None:
    found = {
        (r.concurrency, r.quantity): r.overhead for r in comparison_rows((1, 8), ELASTIC, STATIC)
    }
    assert found[8, TOKENS_PER_S] == pytest.approx(0.1)
    assert found[8, "TTFT p50 ms"] == pytest.approx(0.1)
    assert found[1, TOKENS_PER_S] == pytest.approx(-0.25)
    assert found[1, "TTFT p50 ms"] == pytest.approx(-0.25)


def test_errors_are_counted_over_all_pairs_and_are_no_overhead() -> None:
    (errors,) = (r for r in comparison_rows((8,), ELASTIC, STATIC) if r.quantity == ERRORS)
    assert (errors.elastic, errors.static, errors.overhead) == (2, 0, None)
