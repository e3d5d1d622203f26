"""The picture of `starfish bench chaos --png`: every gap between two tokens of every stream, over
the time since the fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cli.bench.chaos.report import FaultReport
from shared.errors import ConfigError

_COLUMNS = 3


def save_picture(file: Path, reports: Sequence[FaultReport]) -> None:
    """One pane for each fault that was tried. Raises ConfigError if matplotlib is missing, the file
    cannot be written, or there is nothing to draw."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install matplotlib") from error
    drawn = [report for report in reports if report.points]
    if not drawn:
        raise ConfigError("--png: no fault was tried")
    columns = min(_COLUMNS, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(5.0 * columns, 0.6 + 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for pane, report in zip(panes, drawn, strict=False):
        times, gaps = zip(*report.points, strict=True)
        pane.plot(times, gaps, linestyle="none", marker=".", markersize=2, color="tab:blue")
        pane.axvline(0.0, color="tab:red", linewidth=0.8)
        held_s = max(one.held_s for one in report.tries)
        if held_s:
            pane.axvspan(0.0, held_s, color="tab:red", alpha=0.1)
        pane.axhline(report.usual_p99_ms, color="tab:green", linewidth=0.8, linestyle="--")
        pane.set_yscale("log")
        pane.set_title(f"{report.name} ({len(report.tries)} tries)", fontsize=9)
    for pane in panes[len(drawn) :]:
        pane.set_visible(False)
    figure.supxlabel("seconds since the fault (shaded: while it lasts)")
    figure.supylabel("gap between two tokens, ms (dashed: usual p99)")
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {file}: {error}") from error
