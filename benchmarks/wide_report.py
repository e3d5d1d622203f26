"""Tables and a picture of the results of `benchmarks.wide`, of as many parts as have run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from shared.errors import ConfigError

Row = dict[str, Any]
_PARTS_OF_DEATHS = {"deaths": "One rank a card", "shared-cards": "Four ranks a card, in turns"}
_KINDS = ("elastic", "static", "one-replica")


def tables(out: Path) -> str:
    """Markdown. Raises ConfigError if nothing has run."""
    parts = [*_deaths(out), *_overhead(out), *_growth(out)]
    if not parts:
        raise ConfigError(f"{out} has no results: run a part first")
    return "\n\n".join(parts)


def save_picture(out: Path, file: Path) -> None:
    """Tokens/s by the number of cards, one line a batch; nothing if `growth` has not run. Raises
    ConfigError if matplotlib is missing."""
    rows = _rows(out, "growth-qwen3-30b")
    if not rows:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("growth.png needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    pane = figure.subplots()
    for batch in sorted({row["batch"] for row in rows}):
        points = [(row["ranks"], row["tokens_per_s"]) for row in rows if row["batch"] == batch]
        pane.plot(*zip(*points, strict=True), marker="o", label=f"{batch} streams a rank")
    pane.set_xscale("log", base=2)
    pane.set_yscale("log")
    pane.set_xlabel("ranks, one a card")
    pane.set_ylabel("tokens/s")
    pane.legend()
    figure.savefig(file, dpi=110)


def _deaths(out: Path) -> Iterator[str]:
    for name, title in _PARTS_OF_DEATHS.items():
        faults = _read(out, name).get("faults", [])
        if faults:
            yield _table(
                title,
                "fault|gap p50 / p99 / max, ms|usual p99|tokens/s before → after|share"
                "|95 % of it after, s|streams|failed / wrong of compared|rejoined, s|gap then, p99",
                [_death_cells(fault) for fault in faults],
            )


def _death_cells(fault: Row) -> Sequence[str]:
    rejoin = fault["rejoin_gap_ms"]
    recovered_ms, rejoined_s = fault["recovered_ms"], fault["rejoined_s"]
    return (
        fault["fault"],
        _spread(fault["gap_ms"]),
        f"{fault['usual_gap_p99_ms']:.1f}",
        f"{fault['tokens_per_s_before']:,.0f} → {fault['tokens_per_s_after']:,.0f}",
        f"{fault['surviving_share']:.2f}",
        "never" if recovered_ms is None else f"{recovered_ms / 1000:.1f}",
        str(fault["streams"]),
        f"{len(fault['failed'])} / {len(fault['wrong'])} of {fault['checked']}",
        "never" if rejoined_s is None else f"{rejoined_s:.1f}",
        "-" if rejoin is None else f"{rejoin['p99']:.0f}",
    )


def _spread(spread: Row | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{spread[name]:.0f}" for name in ("p50", "p99", "max"))


def _overhead(out: Path) -> Iterator[str]:
    """Medians over the rounds, and tokens/s against the static instance's."""
    rounds = {
        kind: [row for file in sorted(out.glob(f"overhead-{kind}-*.json")) for row in _load(file)]
        for kind in _KINDS
    }
    batches = sorted({row["batch"] for rows in rounds.values() for row in rows})
    lines = []
    for batch in batches:
        static = _median(rounds["static"], batch, "tokens_per_s")
        for kind in _KINDS:
            rows = [row for row in rounds[kind] if row["batch"] == batch]
            rate = _median(rows, batch, "tokens_per_s")
            if rate is None:
                continue
            ratio = f"{rate / static:.3f}" if static else "-"
            ttft, itl = (median(row[name]["p50"] for row in rows) for name in ("ttft_ms", "itl_ms"))
            lines.append((str(batch), kind, f"{rate:,.0f}", ratio, f"{ttft:.1f}", f"{itl:.2f}"))
    if lines:
        head = "streams a rank|instance|tokens/s|of static|TTFT p50, ms|ITL p50, ms"
        yield _table("Elastic, static, and one replica of each expert", head, lines)


def _growth(out: Path) -> Iterator[str]:
    head = "ranks|streams a rank|tokens/s|step, ms|of the roofline|TTFT p50, ms|ITL p50 / p99, ms"
    for model in ("qwen3-30b", "qwen3-235b"):
        rows = [*_rows(out, f"growth-{model}"), *_rows(out, f"prefill-{model}")]
        if rows:
            yield _table(f"{model}'s shape", head, [_rate_cells(row) for row in rows])


def _rate_cells(row: Row) -> Sequence[str]:
    floor = row["floor"]
    return (
        str(row["ranks"]),
        str(row["batch"]),
        f"{row['tokens_per_s']:,.0f}",
        f"{row['step_ms']:.2f}",
        "-" if floor is None else f"{floor['share']:.0%}",
        f"{row['ttft_ms']['p50']:.1f}",
        f"{row['itl_ms']['p50']:.2f} / {row['itl_ms']['p99']:.2f}",
    )


def _table(title: str, head: str, lines: Sequence[Sequence[str]]) -> str:
    columns = head.split("|")
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join([f"{title}:", "", *(f"| {' | '.join(row)} |" for row in rows)])


def _median(rows: Sequence[Row], batch: int, name: str) -> float | None:
    values = [row[name] for row in rows if row["batch"] == batch and row[name] is not None]
    return median(values) if values else None


def _rows(out: Path, name: str) -> list[Row]:
    file = out / f"{name}.json"
    return _load(file) if file.exists() else []


def _load(file: Path) -> list[Row]:
    """Those that measured a rate."""
    rows: list[Row] = json.loads(file.read_text())["rows"]
    return [row for row in rows if row["tokens_per_s"] is not None]


def _read(out: Path, name: str) -> Row:
    file = out / f"{name}.json"
    found: Row = json.loads(file.read_text()) if file.exists() else {}
    return found
