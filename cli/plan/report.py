"""What a placement survives and what each possible death would move. Pure, apart from printing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from control_plane.placement import advise, balance, compute_fault_tolerance, describe, shrink
from shared.expert_map import ExpertMap
from shared.types import NodeId, RankId

DEATHS_MAX = 64
"""Most rows of a table of deaths."""


class PlanSizes(NamedTuple):
    """The cluster and the model that are planned for."""

    layers: int
    experts: int
    ranks: int
    nodes: int
    slots_per_rank: int
    redundant: int
    survive: int
    bytes_per_expert: int

    @property
    def node_of(self) -> dict[RankId, NodeId]:
        return {RankId(r): NodeId(f"node{r * self.nodes // self.ranks}") for r in range(self.ranks)}


def report_of(
    expert_map: ExpertMap, loads: NDArray[np.float64], sizes: PlanSizes
) -> dict[str, Any]:
    """The JSON of `starfish plan --json`. `loads` is `[layers, experts]`."""
    node_of, ranks = sizes.node_of, sorted(sizes.node_of)
    tolerance, advice = compute_fault_tolerance(expert_map, node_of), advise(expert_map, node_of)
    peak = balance(expert_map.placement, loads, ranks)
    filled = (expert_map.placement >= 0).sum(axis=(0, 2))
    rank_deaths = ranks[:: -(-len(ranks) // DEATHS_MAX)]
    by_node = {name: [r for r in ranks if node_of[r] == name] for name in node_of.values()}
    names = list(by_node)
    return {
        **sizes._asdict(),
        "balance": {"mean": float(peak.mean()), "max": float(peak.max())},
        "left_in_host_memory": len(expert_map.uncovered()),
        "survives": {
            "rank_failures": tolerance.rank_failures,
            "node_failures": tolerance.node_failures,
            "rank_failures_with_reload": tolerance.rank_failures_with_reload,
            "node_failures_with_reload": tolerance.node_failures_with_reload,
            "experts_on_one_rank": len(tolerance.at_risk_of_rank),
            "experts_on_one_node": len(tolerance.at_risk_of_node),
        },
        "advice": [more._asdict() for more in advice],
        "summary": describe(tolerance, advice),
        "memory": {
            "bytes_per_expert": sizes.bytes_per_expert,
            "filled_bytes_per_rank_max": int(filled.max()) * sizes.bytes_per_expert,
            "slot_bytes_per_rank": sizes.layers * sizes.slots_per_rank * sizes.bytes_per_expert,
        },
        "rank_deaths": [
            {"rank": rank, **_death(expert_map, loads, sizes, [rank])} for rank in rank_deaths
        ],
        "node_deaths": [
            {"node": name, **_death(expert_map, loads, sizes, by_node[name])}
            for name in names[:: -(-len(names) // DEATHS_MAX)]
            if len(names) > 1
        ],
    }


def _death(
    expert_map: ExpertMap, loads: NDArray[np.float64], sizes: PlanSizes, dead: list[RankId]
) -> dict[str, Any]:
    """What `dead` would cost the survivors: replicas replaced, experts to load, balance."""
    alive = [r for r in sorted(sizes.node_of) if r not in set(dead)]
    if not alive:
        return {"lost": expert_map.num_layers * expert_map.num_experts, "survivors": 0}
    result = shrink(expert_map, dead, loads)
    before = expert_map.placement[:, alive]
    replaced = (before >= 0) & (result.refilled[:, alive] != before)
    return {
        "survivors": len(alive),
        "lost": len(result.slot_fills) + len(result.uncoverable),
        "moved": int(replaced.sum()),
        "uncoverable": len(result.uncoverable),
        "load_bytes": len(result.slot_fills) * sizes.bytes_per_expert,
        "balance": float(balance(result.refilled, loads, alive).mean()),
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    peak, memory = report["balance"], report["memory"]
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("experts", f"{report['layers']} layers x {report['experts']} + {report['redundant']}"),
        (
            "cluster",
            f"{report['ranks']} ranks on {report['nodes']} nodes, "
            f"{report['slots_per_rank']} slots each",
        ),
        ("balance", f"busiest / mean rank: {peak['mean']:.4f} (worst layer {peak['max']:.4f})"),
        (
            "memory",
            f"{memory['filled_bytes_per_rank_max'] / 2**30:.2f} GiB of experts per rank, "
            f"{memory['slot_bytes_per_rank'] / 2**30:.2f} GiB with spare slots",
        ),
    ]
    if report["left_in_host_memory"]:
        rows.append(
            ("no slot", f"the {report['left_in_host_memory']} coldest experts stay in host memory")
        )
    for name, text in rows:
        table.add_row(f"[bold]{name}[/]", text)
    console.print(table)
    console.print(report["summary"])
    for key, what in (("rank_deaths", "rank"), ("node_deaths", "node")):
        if report[key]:
            console.print(_death_table(report[key], what, report[f"{what}s"]))


def _death_table(deaths: list[dict[str, Any]], what: str, total: int) -> Table:
    shown = "" if len(deaths) == total else f" ({len(deaths)} of {total})"
    table = Table(title=f"If one {what} dies{shown}", title_justify="left")
    for header in (what, "orphans", "replicas moved", "to load first", "no slot", "balance after"):
        table.add_column(header, justify="right")
    for row in deaths:
        if not row["survivors"]:
            table.add_row(str(row[what]), str(row["lost"]), "-", "-", "-", "nobody left")
            continue
        table.add_row(
            str(row[what]),
            str(row["lost"]),
            str(row["moved"]),
            f"{row['load_bytes'] / 2**20:.0f} MiB",
            str(row["uncoverable"]),
            f"{row['balance']:.3f}",
        )
    return table
