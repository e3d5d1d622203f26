"""What `starfish bench chaos` reports of each fault, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from cli.bench.chaos.faults import Fault
from cli.bench.chaos.statistics import Damage, TryResult
from cli.bench.stats import Spread, percentile

_TABLE_WIDTH = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultReport:
    """All tries of one fault. `points` are gaps over time, as `gaps_over_time` has them. `skipped`:
    why there are no tries."""

    name: str
    summary: str
    target_ms: float | None
    usual_p99_ms: float = math.nan
    tries: tuple[TryResult, ...] = ()
    points: tuple[tuple[float, float], ...] = ()
    skipped: str | None = None

    @classmethod
    def skipped_fault(cls, fault: Fault, why: str) -> FaultReport:
        return cls(name=fault.name, summary=fault.summary, target_ms=fault.target_ms, skipped=why)

    @property
    def is_whole(self) -> bool:
        return all(one.whole_s is not None for one in self.tries)

    @property
    def lost(self) -> int:
        return sum(one.lost for one in self.tries)

    @property
    def damage(self) -> Damage:
        return sum((one.damage for one in self.tries), Damage())

    @property
    def gaps(self) -> Spread:
        """Of the longest gaps around the fault, over all streams of all tries."""
        return Spread.of([gap for one in self.tries for gap in one.gaps_ms])

    @property
    def return_gaps(self) -> Spread:
        return Spread.of([gap for one in self.tries for gap in one.return_gaps_ms])

    @property
    def added_p99_ms(self) -> float:
        """How much the longest gap around the fault is above the usual, at p99."""
        return self.gaps.p99 - self.usual_p99_ms

    @property
    def meets_target(self) -> bool | None:
        """None if nothing is promised, or nothing was tried."""
        if self.target_ms is None or not self.tries:
            return None
        return self.added_p99_ms < self.target_ms

    def mean(self, field: str) -> float:
        """Of "before", "during" or "after", tokens/s."""
        values = [float(getattr(one, field)) for one in self.tries]
        return sum(values) / len(values) if values else math.nan


def is_exact(reports: Sequence[FaultReport]) -> bool:
    """Whether no token of any stream was lost, doubled or changed, and the instance was whole
    again after every try."""
    return all(report.damage == Damage() and report.is_whole for report in reports)


def to_json(reports: Sequence[FaultReport]) -> list[dict[str, Any]]:
    """Without the points, of which there are many. A number that does not exist is null."""
    return [_plain(report) for report in reports]


def _plain(report: FaultReport) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(report)
    del plain["points"]
    if report.skipped is None:
        whole = [one.whole_s for one in report.tries if one.whole_s is not None]
        plain |= {
            "lost": report.lost,
            "damage": msgspec.to_builtins(report.damage),
            "gaps": msgspec.to_builtins(report.gaps),
            "return_gaps": msgspec.to_builtins(report.return_gaps),
            "added_p99_ms": report.added_p99_ms,
            "meets_target": report.meets_target,
            "before": report.mean("before"),
            "during": report.mean("during"),
            "after": report.mean("after"),
            "whole_s_p50": percentile(whole, 50),
            "whole_s_max": percentile(whole, 100),
        }
    return {name: _finite(value) for name, value in plain.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_reports(reports: Sequence[FaultReport], console: Console) -> None:
    """Gaps are in ms: the longest of each stream; `added` is p99 above the usual p99. Throughputs
    are in tokens/s."""
    table = Table(box=None, pad_edge=False)
    for name in (
        *("fault", "tries", "lost", "wrong", "p50", "p99", "max", "added", "target"),
        *("return", "before", "during", "after", "whole, s"),
    ):
        table.add_column(name, justify="left" if name == "fault" else "right", no_wrap=True)
    for report in reports:
        if report.skipped is None:
            table.add_row(*_cells(report))
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)
    for report in reports:
        if report.skipped is not None:
            console.print(f"{report.name}: left out, {report.skipped}", highlight=False)


def _cells(report: FaultReport) -> tuple[str, ...]:
    damage = report.damage
    wrong = damage.lost + damage.doubled + damage.changed
    whole = [one.whole_s for one in report.tries if one.whole_s is not None]
    met = report.meets_target
    target = "–" if report.target_ms is None else f"{report.target_ms:.0f}"
    return (
        report.name,
        str(len(report.tries)),
        str(report.lost),
        str(wrong),
        *(f"{value:.0f}" for value in (report.gaps.p50, report.gaps.p99, report.gaps.max)),
        f"[red]{report.added_p99_ms:.0f}[/]" if met is False else f"{report.added_p99_ms:.0f}",
        target,
        f"{report.return_gaps.p99:.0f}",
        *(f"{report.mean(field):.0f}" for field in ("before", "during", "after")),
        f"{percentile(whole, 50):.1f}" if report.is_whole else "[red]never[/]",
    )
