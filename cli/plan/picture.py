"""The picture of `starfish plan --png`: one layer's slots by rank before and after a death,
coloured by the load of their experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.expert_map import Placement


def save_picture(
    file: Path, before: Placement, after: Placement, loads: NDArray[np.float64], dead: int
) -> None:
    """`before` and `after` are `[num_ranks, slots_per_rank]`. Raises ConfigError if matplotlib is
    missing or the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install matplotlib") from error
    num_ranks, width = before.shape
    size = (min(24.0, 4 + 0.5 * width), min(40.0, 2 + 0.22 * num_ranks))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panes = figure.subplots(1, 2, sharey=True)
    mean = float(loads.mean()) or 1.0
    heat_max = float(loads.max()) / mean
    for pane, rows, title in zip(
        panes, (before, after), ("before", f"after rank {dead}'s death"), strict=True
    ):
        heat = np.where(rows >= 0, loads[np.maximum(rows, 0)] / mean, np.nan)
        image = pane.imshow(heat, aspect="auto", cmap="inferno", vmin=0, vmax=heat_max)
        pane.set_title(title)
        pane.set_xlabel("slot")
    for rank, slot in np.argwhere((after >= 0) & (after != before)):
        panes[1].plot(slot, rank, marker="s", markerfacecolor="none", markeredgecolor="cyan")
    panes[0].set_ylabel("rank")
    figure.colorbar(image, ax=panes, label="expert's load / mean (white: empty; cyan: refilled)")
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {file}: {error}") from error
