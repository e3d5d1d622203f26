"""`starfish status --experts`: which experts tokens choose, and how much work that is for each
rank, since the ranks have counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.expert_map import ExpertMap
from shared.types import RankId
from shared.wire import ExpertCounts

TOP = 10


def expert_status(
    expert_map: ExpertMap | None, counts: Mapping[RankId, ExpertCounts | None]
) -> dict[str, Any] | None:
    """The entry `experts` of `starfish status --json`. None if no rank has counted anything.

    `load` of an expert is the pairs of a token and this expert, over the mean expert of its layer;
    of a rank, the pairs that its slots computed, over the mean rank. `layer_imbalance` is the
    busiest rank's work over the mean."""
    if expert_map is None:
        return None
    sizes = (expert_map.num_layers, expert_map.num_experts)
    known = {
        m.rank: found
        for m in expert_map.members
        if (found := counts.get(m.rank)) is not None
        and len(found.chosen) == 4 * sizes[0] * sizes[1]
    }
    if not known:
        return None
    chosen_LE = sum(np.frombuffer(c.chosen, "<u4").reshape(sizes) for c in known.values())
    computed_RL = np.stack([np.frombuffer(c.computed, "<u4") for c in known.values()])
    chosen_LE = np.asarray(chosen_LE, dtype=np.float64)
    if not chosen_LE.any():
        return None
    load_LE = chosen_LE / np.maximum(chosen_LE.mean(axis=1, keepdims=True), 1e-9)
    work_RL = computed_RL / np.maximum(computed_RL.mean(axis=0), 1e-9)
    imbalance_L = work_RL.max(axis=0)
    hottest = np.argsort(-load_LE, axis=None, kind="stable")[:TOP]
    return {
        "top": [_expert(expert_map, load_LE, *divmod(int(n), sizes[1])) for n in hottest],
        "rank_loads": {
            str(rank): round(float(load), 3)
            for rank, load in zip(known, work_RL.mean(axis=1), strict=True)
        },
        "layer_imbalance": {
            "median": round(float(np.median(imbalance_L)), 3),
            "worst": round(float(imbalance_L.max()), 3),
        },
        "replicas_share": all(c.spread for c in known.values()),
    }


def _expert(expert_map: ExpertMap, load_LE: Any, layer: int, expert: int) -> dict[str, Any]:
    ranks, _ = np.nonzero(expert_map.placement[layer] == expert)
    return {
        "layer": layer,
        "expert": expert,
        "load": round(float(load_LE[layer, expert]), 2),
        "ranks": sorted({int(rank) for rank in ranks}),
    }


def render_experts(experts: dict[str, Any] | None, console: Console) -> None:
    if experts is None:
        console.print("no rank has counted tokens of its experts yet")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("MoE layer", "expert", "load", "on ranks"):
        table.add_column(name, justify="left" if name == "on ranks" else "right")
    for each in experts["top"]:
        ranks = ", ".join(map(str, each["ranks"]))
        table.add_row(str(each["layer"]), str(each["expert"]), f"{each['load']:.1f}", ranks)
    console.print(table)
    loads = ", ".join(f"{rank}: {load:.2f}" for rank, load in experts["rank_loads"].items())
    imbalance = experts["layer_imbalance"]
    console.print(
        f"work of the ranks, over their mean: {loads}; of the busiest rank by layer: "
        f"median {imbalance['median']:.2f}, worst {imbalance['worst']:.2f}"
    )
    if not experts["replicas_share"]:
        console.print("one replica of an expert computes for all ranks (--replicas gather)")
