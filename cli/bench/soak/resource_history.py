"""The samples of a soak, and what grows in them: each life of a process that lasts long enough, the
sums over all processes of a kind, and what the instance uses as a whole. No I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from cli.bench.soak.growth import Growth, Quantity, growth_of
from cli.bench.soak.resources import Life, Sample, Usage

INSTANCE = "instance"
_LIFE_MIN_S = 300.0
"""After its warm-up. What a rank holds for its peers goes up and down as these come and go: in a
shorter life that looks like growth."""

_SETTLES_AFTER_S = {Quantity.ETCD_VERDICTS: 660.0}
"""A verdict is kept for ten minutes or eleven: before, there can only be more and more."""

Series = list[tuple[float, float]]


class ResourceHistory:
    def __init__(self, began_at: float, warm_up_s: float) -> None:
        self._began_at, self._warm_up_s = began_at, warm_up_s
        self._samples: list[Sample] = []

    @property
    def last(self) -> Sample | None:
        return self._samples[-1] if self._samples else None

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)

    def lives(self) -> list[Growth]:
        """Of each life that lasted long enough after its warm-up."""
        found: dict[tuple[Life, Quantity], Series] = defaultdict(list)
        first_seen: dict[Life, float] = {}
        for sample in self._samples:
            for life, usage in sample.processes.items():
                seen = first_seen.setdefault(life, sample.at)
                if sample.at - seen >= self._warm_up_s:
                    for quantity, value in usage.items():
                        found[life, quantity].append((sample.at, value))
        return [
            growth
            for (life, quantity), series in found.items()
            if series[-1][0] - series[0][0] >= _LIFE_MIN_S
            and (growth := growth_of(str(life), quantity, series)) is not None
        ]

    def sums(self) -> list[Growth]:
        """Over all processes of each kind, and over the instance, at moments at which it was
        whole."""
        whole = [sample for sample in self._samples if sample.is_whole]
        roles = {life.role for sample in whole for life in sample.processes}
        series: dict[tuple[str, Quantity], Series] = defaultdict(list)
        for sample in whole:
            for role, usage in _by_role(sample, roles):
                for quantity, value in usage.items():
                    settles = max(self._warm_up_s, _SETTLES_AFTER_S.get(quantity, 0.0))
                    if sample.at - self._began_at >= settles:
                        series[role, quantity].append((sample.at, value))
        found = (growth_of(role, quantity, each) for (role, quantity), each in series.items())
        return [growth for growth in found if growth is not None]


def _by_role(sample: Sample, roles: set[str]) -> Iterator[tuple[str, Usage]]:
    yield INSTANCE, sample.instance
    for role in sorted(roles):
        total: Usage = defaultdict(float)
        total[Quantity.PROCESSES] = 0.0
        for life, usage in sample.processes.items():
            if life.role == role:
                total[Quantity.PROCESSES] += 1
                for quantity, value in usage.items():
                    total[quantity] += value
        if total[Quantity.PROCESSES]:
            yield f"all {role}", total
