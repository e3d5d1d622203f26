"""What `starfish bench soak` reports: a line each minute, then tables and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from cli.bench.soak.growth import Growth, Quantity
from cli.bench.soak.load import LoadCount
from cli.bench.soak.requests import RequestKind
from cli.bench.soak.resources import Sample
from cli.bench.stats import percentile

_MB = 1 << 20
_TABLE_WIDTH = 120
_SHOWN_ERRORS = 5


@dataclass(slots=True, kw_only=True)
class FaultCount:
    """`whole_s` has one entry per try, `failed` says why some could not be injected."""

    whole_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakReport:
    """`load` by kind of request, `faults` by name. `lives` are of single processes, `sums` over all
    of a kind and over the instance. `ended_early`: why, if it did."""

    minutes: float
    load: Mapping[str, LoadCount]
    faults: Mapping[str, FaultCount]
    lives: tuple[Growth, ...]
    sums: tuple[Growth, ...]
    ended_early: str | None

    @property
    def num_faults(self) -> int:
        return sum(len(count.whole_s) for count in self.faults.values())

    def reasons(self) -> list[str]:
        """Why the soak has failed; empty if it has not."""
        found = [] if self.ended_early is None else [self.ended_early]
        for kind, count in self.load.items():
            if count.wrong:
                damage = count.damage
                found.append(
                    f"{kind}: {damage.lost} tokens lost, {damage.doubled} doubled, "
                    f"{damage.changed} changed"
                )
        for name, fault in self.faults.items():
            found += [f"{name} failed: {message}" for message in fault.failed]
        found += [f"growth: {describe(each)}" for each in self.sums + self.lives if each.has_grown]
        return found


def describe(growth: Growth) -> str:
    first, last, tolerance = (
        amount(growth.quantity, value) for value in (growth.first, growth.last, growth.tolerance)
    )
    return (
        f"{growth.quantity.value} of {growth.where} from {first} to {last} in "
        f"{growth.lasted_s / 60:.0f} min (tolerance {tolerance})"
    )


def amount(quantity: Quantity, value: float) -> str:
    return f"{value / _MB:.1f} MB" if quantity.is_bytes else f"{value:g}"


def progress_line(
    elapsed_s: float,
    load: Mapping[RequestKind, LoadCount],
    faults: Mapping[str, FaultCount],
    sample: Sample,
) -> str:
    def total(quantity: Quantity) -> str:
        if quantity in sample.instance:
            return amount(quantity, sample.instance[quantity])
        return amount(quantity, sum(u.get(quantity, 0.0) for u in sample.processes.values()))

    counts = load.values()
    words = [
        f"{elapsed_s / 60:.0f} min: {sum(len(f.whole_s) for f in faults.values())} faults",
        f"{sum(c.sent for c in counts)} requests",
        f"{sum(c.tokens for c in counts)} tokens",
        f"{sum(c.lost + c.refused for c in counts)} lost",
        f"{sum(c.wrong for c in counts)} wrong",
        f"{len(sample.processes)} processes",
    ]
    words += [
        f"{quantity.value} {total(quantity)}"
        for quantity in Quantity
        if quantity is not Quantity.PROCESSES
    ]
    return ", ".join(words)


def to_json(report: SoakReport) -> dict[str, Any]:
    """A number that does not exist is null."""
    plain: dict[str, Any] = msgspec.to_builtins(report)
    for name, count in report.load.items():
        plain["load"][name] |= {"wrong": count.wrong}
    for kind in ("lives", "sums"):
        for each, growth in zip(plain[kind], getattr(report, kind), strict=True):
            each["has_grown"] = growth.has_grown
    return plain | {"num_faults": report.num_faults, "reasons": report.reasons()}


def print_report(report: SoakReport, console: Console) -> None:
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(_load_table(report.load))
    _print_errors(report.load.values(), console)
    console.print(_fault_table(report.faults))
    for title, growths in (("", report.sums), (" (of one process, worst)", _worst(report.lives))):
        if growths:
            console.print(_growth_table(title, growths))
    if not report.sums:
        console.print("it was too short to say whether anything grows", style="yellow")
    for reason in report.reasons():
        console.print(f"[red]failed[/]: {reason}", highlight=False, soft_wrap=True)
    if not report.reasons():
        console.print(
            f"nothing grew and no token was wrong in {report.minutes:.0f} minutes with "
            f"{report.num_faults} faults",
            highlight=False,
        )


def _print_errors(counts: Iterable[LoadCount], console: Console) -> None:
    errors = sorted({error for count in counts for error in count.errors})
    for error in errors[:_SHOWN_ERRORS]:
        console.print(f"an error of a client: {error}", highlight=False, soft_wrap=True)


def _load_table(load: Mapping[str, LoadCount]) -> Table:
    names = ("sent", "left", "lost", "refused", "resumed", "tokens", "wrong", "longest gap, ms")
    table = _table("requests", *names)
    for kind, count in load.items():
        numbers = (count.sent, count.left, count.lost, count.refused, count.resumed, count.tokens)
        wrong = f"[red]{count.wrong}[/]" if count.wrong else "0"
        table.add_row(kind, *map(str, numbers), wrong, f"{count.longest_gap_ms:.0f}")
    return table


def _fault_table(faults: Mapping[str, FaultCount]) -> Table:
    table = _table("fault", "times", "failed", "whole after, s: median", "longest")
    for name, count in sorted(faults.items()):
        spread = [percentile(count.whole_s, percent) for percent in (50, 100)]
        cells = ["–" if math.isnan(value) else f"{value:.1f}" for value in spread]
        table.add_row(name, str(len(count.whole_s)), str(len(count.failed)), *cells)
    return table


def _growth_table(title: str, growths: Sequence[Growth]) -> Table:
    """Thirds of the time, as medians."""
    table = _table(
        f"what{title}", "where", "min", "1st third", "2nd", "3rd", "tolerance", "an hour"
    )
    for each in growths:
        values = (each.first, each.middle, each.last, each.tolerance, each.per_hour)
        cells = [amount(each.quantity, value) for value in values]
        cells[4] = f"+{cells[4]}" if each.per_hour > 0 else cells[4]
        if each.has_grown:
            cells[2] = f"[red]{cells[2]}[/]"
        table.add_row(each.quantity.value, each.where, f"{each.lasted_s / 60:.0f}", *cells)
    return table


def _worst(lives: Sequence[Growth]) -> list[Growth]:
    """Of each kind of process and each quantity the life that is closest to what is too much."""
    found: dict[tuple[str, Quantity], Growth] = {}
    for each in lives:
        key = (each.where.partition(" (")[0], each.quantity)
        if key not in found or _excess(each) > _excess(found[key]):
            found[key] = each
    return [found[key] for key in sorted(found, key=lambda key: (key[0], key[1].value))]


def _excess(growth: Growth) -> tuple[bool, float]:
    return growth.has_grown, (growth.last - growth.first) / growth.tolerance


def _table(first: str, *names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="left" if name == "where" else "right", no_wrap=True)
    return table
