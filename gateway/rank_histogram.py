"""A histogram by rank for what happens at every token: an observation is two additions, without the
library's lock and checks. For one thread; the exposition is the library's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily

RANK_LABELS_MAX = 64
"""Ranks with a higher number share one label: an instance may have a thousand of them."""
OTHER_RANKS = "other"


def rank_label(rank: int) -> str:
    """The rank's value of a label of histograms and counters."""
    return str(rank) if rank < RANK_LABELS_MAX else OTHER_RANKS


class RankHistogram:
    def __init__(self, buckets: Sequence[float]) -> None:
        """`buckets` are the upper bounds, without +Inf."""
        self._bounds = tuple(buckets)
        self._num_bounds = len(self._bounds)
        self._by_rank: dict[int, list[float]] = {}
        self._by_label: dict[str, list[float]] = {}  # not cumulative; then +Inf, then the sum

    def observe(self, rank: int, value: float) -> None:
        counts = self._by_rank.get(rank)
        if counts is None:
            counts = self._open(rank)
        counts[bisect_left(self._bounds, value)] += 1
        counts[-1] += value

    def family(
        self,
        name: str,
        text: str,
        *,
        label: str,
        others: Mapping[str, str],
        begun: Collection[str] = (),
    ) -> HistogramMetricFamily:
        """One series for each rank, with the rank in `label`, and the labels `others`. Ranks of
        which nothing has been observed have one if their label is among `begun`."""
        family = HistogramMetricFamily(name, text, labels=[*others, label])
        unseen = dict.fromkeys(begun, [0.0] * (self._num_bounds + 2))
        for value, counts in (unseen | self._by_label).items():
            buckets, total = self._exposed(counts)
            family.add_metric([*others.values(), value], buckets=buckets, sum_value=total)
        return family

    def sum_family(self, name: str, text: str) -> HistogramMetricFamily:
        """One series, of all ranks."""
        columns = zip(*self._by_label.values(), strict=True)
        counts = [sum(column) for column in columns] or [0.0] * (self._num_bounds + 2)
        buckets, total = self._exposed(counts)
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)

    def _open(self, rank: int) -> list[float]:
        counts = self._by_label.setdefault(rank_label(rank), [0.0] * (self._num_bounds + 2))
        self._by_rank[rank] = counts
        return counts

    def _exposed(self, counts: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
        bounds: Iterator[str] = iter([*map(str, self._bounds), "+Inf"])
        return list(zip(bounds, accumulate(counts[:-1]), strict=True)), counts[-1]
